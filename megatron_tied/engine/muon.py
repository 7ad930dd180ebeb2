"""Muon for hidden matrices, AdamW for the rest, as the inner optimizer of any ZeRO stage."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch

from megatron_tied.engine.exchange_blocks import BlockExchange
from megatron_tied.engine.newton_schulz import orthogonalized

# The key of a parameter group that says whose it is.
IS_MUON = "muon"
MOMENTUM = "momentum_buffer"


class MuonAdamW(torch.optim.Optimizer):
    """Muon over the groups whose `muon` is true, `adamw(groups)` over the others.

    A group's tensors may be flat parts of parameters, as ZeRO's are: `locate` tells where the parts of whole matrices
    are, on whichever ranks, and `device` where they are worked on, offloaded ones, too; both have to be set before the
    first step. Momentum is kept part by part. Sources: `torch.optim.Muon`, with Nesterov momentum and an update that is
    scaled by sqrt(max(1, rows / columns)).
    """

    locate: Callable[[torch.Tensor], BlockExchange]
    device: torch.device

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        adamw: Callable[[Sequence[dict[str, Any]]], torch.optim.Optimizer],
        *,
        lr: float,
        momentum: float = 0.95,
        precision: torch.dtype = torch.bfloat16,
    ):
        """`precision`: of the iterations that make matrices orthogonal, and of what travels to them."""
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0, IS_MUON: False})
        others = [group for group in self.param_groups if not group[IS_MUON]]
        self._adamw = adamw([dict(group) for group in others])
        for group, defaults in zip(others, self._adamw.param_groups, strict=True):
            for key, value in defaults.items():
                group.setdefault(key, value)
        self._precision = precision
        self._adamw.state = self.state

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of everything that has a gradient. A collective of the ranks that share parameters."""
        loss = None if closure is None else closure()
        # Those of now: ZeRO puts parts in the place of parameters, and has a step for each group alone.
        self._adamw.param_groups = [group for group in self.param_groups if not group[IS_MUON]]
        self._adamw.step()
        for group in self.param_groups:
            if group[IS_MUON]:
                for holder in group["params"]:
                    if holder.grad is not None:
                        self._update(holder, holder.grad, group)
        return loss

    def _update(self, holder: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[holder]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(holder)
        momentum = state[MOMENTUM].lerp_(grad, 1 - group["momentum"]).view(-1)
        weight, gradient = holder.view(-1), grad.view(-1)
        exchange = self.locate(holder)

        def read(where: slice) -> torch.Tensor:
            return gradient[where].lerp(momentum[where], group["momentum"]).to(self.device, self._precision)

        def write(where: slice, update: torch.Tensor) -> None:
            weight[where].add_(update.to(weight.device), alpha=-group["lr"])

        holder.mul_(1 - group["lr"] * group["weight_decay"])
        for portion in exchange.portions:
            results = _orthogonalized(exchange, exchange.to_owners(portion, read))
            exchange.to_holders(portion, results, write)


def _orthogonalized(exchange: BlockExchange, blocks: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """The update [rows, columns] of each block, float32, from its direction."""
    matrices = {index: exchange.blocks[index].split(block) for index, block in blocks.items()}
    by_shape: dict[torch.Size, list[tuple[int, int]]] = defaultdict(list)
    for index, parts in matrices.items():
        for number, part in enumerate(parts):
            by_shape[part.shape].append((index, number))
    for shape, places in by_shape.items():
        scale = math.sqrt(max(1.0, shape[0] / shape[1]))
        results = orthogonalized(torch.stack([matrices[index][number] for index, number in places]))
        for (index, number), result in zip(places, results.float().mul_(scale), strict=True):
            matrices[index][number] = result
    return {index: exchange.blocks[index].join(parts) for index, parts in matrices.items()}
