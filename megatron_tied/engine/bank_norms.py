"""How large each expert bank's weights, gradient and update are, over all ranks, at any ZeRO stage."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from megatron.core import parallel_state

from megatron_tied.engine.engine import TiedMoEEngine
from megatron_tied.engine.partitions import gradients, weights
from megatron_tied.layers.moe_layer import tied_layers
from megatron_tied.platform import device

_AT_ONCE = 2**22  # elements


@dataclass(frozen=True)
class Norms:
    """L2 norms over all experts of a bank: the weights after the step, the gradient before clipping, the change."""

    weight: float
    gradient: float
    update: float

    @property
    def update_ratio(self) -> float:
        """Update over weight norm; NaN for a bank of zeros."""
        return self.update / self.weight if self.weight else math.nan


class BankNorms:
    """Norms around one optimizer step: `before_update`, the step, `take`.

    In between it holds a copy of the banks' weights that this rank updates, 4 bytes each.
    """

    def __init__(self, engine: TiedMoEEngine):
        self._engine = engine
        bank_of = {
            id(weight): layer.bank.index
            for layer in tied_layers(engine.module)
            if layer.is_owner
            for weight in layer.experts.parameters()
        }
        named = engine.module.named_parameters()
        self._banks = {name: bank_of[id(parameter)] for name, parameter in named if id(parameter) in bank_of}
        self._before: dict[str, torch.Tensor] = {}
        self._gradients: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def before_update(self) -> None:
        """Note gradients and weights; after the last backward pass of a step."""
        scale = self._engine.loss_scale_now()
        reduced = gradients(self._engine, self._banks)
        self._gradients = {name: _squared_norm(gradient) / scale**2 for name, gradient in reduced}
        self._before = {name: part.clone() for name, part in weights(self._engine, self._banks).items()}

    @torch.no_grad()
    def take(self) -> dict[int, Norms]:
        """The norms by bank, the same on every rank; after the step. A collective."""
        squares = torch.zeros(max(self._banks.values()) + 1, 3, dtype=torch.float64, device=device())
        for name, part in weights(self._engine, self._banks).items():
            change = self._before.pop(name).sub_(part)
            parts = _squared_norm(part), self._gradients.pop(name), _squared_norm(change)
            squares[self._banks[name]] += torch.stack([part.to(squares.device) for part in parts])
        torch.distributed.all_reduce(squares)
        norms = (squares / self._holders()).sqrt().tolist()
        return {bank: Norms(*norms[bank]) for bank in sorted(set(self._banks.values()))}

    def _holders(self) -> int:
        """How many ranks hold an element of a bank in their optimizer: ZeRO leaves each to one."""
        is_whole = self._engine.zero_optimization_stage() == 0
        return parallel_state.get_expert_data_parallel_world_size() if is_whole else 1


def _squared_norm(tensor: torch.Tensor) -> torch.Tensor:
    # In parts: each is copied in float64.
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in torch.split(tensor, _AT_ONCE)]
    return torch.stack(norms).square().sum()
