"""The language model loss, in training and on held-out data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from megatron.core import parallel_state

from megatron_tied.engine.engine import TiedMoEEngine

Batch = dict[str, torch.Tensor]


class Inputs(NamedTuple):
    """A micro-batch on the device: int64 [b, s], and `loss_mask` float32 [b, s]."""

    tokens: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    loss_mask: torch.Tensor

    def mean(self, losses: torch.Tensor) -> torch.Tensor:
        """The mean of what each token has [b, s], over those that count."""
        return (losses * self.loss_mask).sum() / self.loss_mask.sum()


class LossFunction:
    """Mean cross entropy per token of one micro-batch [b, s], through the engine."""

    def __init__(self, device: torch.device):
        self._device = device

    def __call__(self, engine: Callable[..., torch.Tensor], batch: Batch) -> torch.Tensor:
        """A scalar that `engine.backward` takes."""
        inputs = self.inputs(batch)
        return inputs.mean(engine(inputs.tokens, inputs.position_ids, None, labels=inputs.labels).float())

    def inputs(self, batch: Batch) -> Inputs:
        """The parts of `batch`, on the device."""
        return Inputs(*(batch[name].to(self._device, non_blocking=True) for name in Inputs._fields))


@torch.no_grad()
def evaluate(engine: TiedMoEEngine, loss_function: LossFunction, batches: Iterable[Batch]) -> float:
    """Mean loss over this rank's `batches` and over data parallel ranks; the engine is left in training mode."""
    engine.eval()
    losses = [loss_function(engine, batch) for batch in batches]
    engine.train()
    return average_over_ranks(torch.stack(losses).mean())


def average_over_ranks(value: torch.Tensor) -> float:
    """The mean of a scalar over data parallel ranks. A collective."""
    group = parallel_state.get_data_parallel_group()
    total = value.detach().clone()
    torch.distributed.all_reduce(total, group=group)
    mean: float = total.item() / group.size()
    return mean
