"""A model under plain PyTorch: AdamW over each parameter once, and DistributedDataParallel on several ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from megatron_tied.training.optimizer import adamw
from megatron_tied.training.optimizer_config import OptimizerConfig


class PlainEngine:
    """Trains `module` with the interface of a DeepSpeed engine.

    16-bit weights have float32 masters, which AdamW updates, as they have under DeepSpeed: equal precision, and equal
    work in the optimizer.
    """

    def __init__(self, module: torch.nn.Module, settings: OptimizerConfig, accumulation: int):
        self.module = module
        self._accumulation = accumulation
        self._clip = settings.clip_grad
        self._micro_step = 0
        self._weights = list(module.parameters())  # a shared one comes once
        self._masters = [_master(weight) for weight in self._weights]
        groups = [
            {
                "params": [master for master in self._masters if (master.dim() > 1) == decays],
                "weight_decay": settings.weight_decay if decays else 0.0,
            }
            for decays in (True, False)
        ]
        self.optimizer = adamw(groups, settings, lr=settings.lr)
        several = torch.distributed.get_world_size() > 1
        # Without a second copy of the gradients in its buckets.
        self._parallel = DistributedDataParallel(module, gradient_as_bucket_view=True) if several else None

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of a step."""
        return self._accumulation

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass."""
        if self._parallel is None:
            return self.module(*args, **kwargs)
        # It looks at this in forward: only the last micro-batch's backward pass reduces.
        self._parallel.require_backward_grad_sync = self._is_last()
        return self._parallel(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of one micro-batch's share of the loss."""
        (loss / self._accumulation).backward()

    def step(self) -> None:
        """After the last micro-batch: clip, update, clear."""
        if self._is_last():
            self._update()
        self._micro_step += 1

    def state_tensors(self) -> Iterator[torch.Tensor]:
        """Masters and optimizer states."""
        yield from self._masters
        for state in self.optimizer.state.values():
            yield from filter(torch.is_tensor, state.values())

    def _is_last(self) -> bool:
        return (self._micro_step + 1) % self._accumulation == 0

    @torch.no_grad()
    def _update(self) -> None:
        separate = [pair for pair in zip(self._weights, self._masters, strict=True) if pair[0] is not pair[1]]
        for weight, master in separate:
            master.grad = None if weight.grad is None else weight.grad.float()
        if self._clip:
            torch.nn.utils.clip_grad_norm_(self._masters, self._clip)
        self.optimizer.step()
        for weight, master in separate:
            weight.copy_(master)
            master.grad = None
        for weight in self._weights:
            weight.grad = None


def _master(weight: torch.nn.Parameter) -> torch.nn.Parameter:
    if weight.dtype == torch.float32:
        return weight
    return torch.nn.Parameter(weight.detach().float())
