"""Data for benchmarks: tokens at random, so that no corpus is needed."""

from __future__ import annotations

import torch

from megatron_tied.training.config import RunConfig
from megatron_tied.training.evaluation import Batch


def random_batches(config: RunConfig) -> list[Batch]:
    """Enough micro-batches for one step."""
    shape = config.train.micro_batch_size, config.train.seq_length
    count = config.gradient_accumulation_steps(torch.distributed.get_world_size())
    return [
        {
            "tokens": torch.randint(config.model.vocab_size, shape),
            "labels": torch.randint(config.model.vocab_size, shape),
            "position_ids": torch.arange(shape[1]).expand(shape),
            "loss_mask": torch.ones(shape),
        }
        for _ in range(count)
    ]
