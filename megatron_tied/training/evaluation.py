"""The language model loss, in training and on held-out data."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core import parallel_state

from megatron_tied.engine.engine import TiedMoEEngine

Batch = dict[str, torch.Tensor]


class LossFunction:
    """Mean cross entropy per token of one micro-batch [b, s], through the engine."""

    def __init__(self, seq_length: int, device: torch.device):
        self._device = device
        # Megatron-Core makes this mask itself only on CUDA; True: may not attend. [1, 1, s, s]
        self._mask = torch.ones(seq_length, seq_length, dtype=torch.bool, device=device).triu(1)[None, None]

    def __call__(self, engine: TiedMoEEngine, batch: Batch) -> torch.Tensor:
        """A scalar that `engine.backward` takes."""
        tokens, labels, positions, loss_mask = (
            batch[name].to(self._device, non_blocking=True)
            for name in ("tokens", "labels", "position_ids", "loss_mask")
        )
        losses = engine(tokens, positions, self._mask, labels=labels).float()
        return (losses * loss_mask).sum() / loss_mask.sum()


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
    return total.item() / group.size()
