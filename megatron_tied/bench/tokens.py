"""Random tokens, the same for every contender: no corpus is needed, and no contender sees easier data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core import parallel_state

from megatron_tied.training.config import RunConfig
from megatron_tied.training.evaluation import Batch
from megatron_tied.training.vocabulary import vocabulary_size


def random_batches(config: RunConfig) -> Callable[[int], list[Batch]]:
    """A function from the number of a step to this rank's micro-batches in it; tensor parallel ranks get the same."""
    micro_batch, length = config.train.micro_batch_size, config.train.seq_length
    accumulation = config.gradient_accumulation_steps(torch.distributed.get_world_size())
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    vocabulary = vocabulary_size(config)
    positions, mask = torch.arange(length).expand(micro_batch, length), torch.ones(micro_batch, length)

    def of_step(step: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(config.train.seed + step * ranks + rank)
        shape = accumulation, micro_batch, length + 1
        return [
            {
                "tokens": rows[:, :-1].contiguous(),
                "labels": rows[:, 1:].contiguous(),
                "position_ids": positions,
                "loss_mask": mask,
            }
            for rows in torch.randint(vocabulary, shape, generator=generator)
        ]

    return of_step
