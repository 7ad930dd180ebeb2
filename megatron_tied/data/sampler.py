"""Which samples make up which micro-batch: a function of the samples consumed, not of the number of ranks."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from megatron_tied.errors import ConfigError, Problem

# A process that loads data and has delivered nothing for so long has hung: an error ends the run, a wait would not.
_STALLED_SECONDS = 600
_KEYS = ("tokens", "labels", "loss_mask", "position_ids")

Sample = dict[str, torch.Tensor]


class GlobalBatchSampler(Sampler[list[int]]):
    """Yields one rank's micro-batches, as lists of sample indices, from `consumed_samples` on.

    A global batch is the next `global_batch_size` indices; its micro-batch m of data-parallel rank r starts
    at offset (m * dp_size + r) * micro_batch_size. Only whole global batches are drawn of `num_samples`.
    """

    def __init__(
        self,
        *,
        num_samples: int,
        consumed_samples: int,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
    ) -> None:
        if global_batch_size % (micro_batch_size * dp_size):
            step = f"{micro_batch_size} * {dp_size} (micro-batch size * data-parallel size)"
            valid = f"must be a multiple of {step}"
            raise ConfigError(Problem("train.global_batch_size", global_batch_size, valid))
        self.num_samples = num_samples
        self.consumed_samples = consumed_samples
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.dp_rank = dp_rank
        self.dp_size = dp_size

    def __len__(self) -> int:
        batches = max(0, self.num_samples - self.consumed_samples) // self.global_batch_size
        return batches * (self.global_batch_size // (self.micro_batch_size * self.dp_size))

    def __iter__(self) -> Iterator[list[int]]:
        first = self.consumed_samples + self.dp_rank * self.micro_batch_size
        for micro_batch in range(len(self)):
            start = first + micro_batch * self.dp_size * self.micro_batch_size
            yield list(range(start, start + self.micro_batch_size))


def collate(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Stack samples: tokens, labels, position_ids (int64 [b, s]) and loss_mask (float32 [b, s])."""
    return {key: torch.stack([sample[key] for sample in samples]) for key in _KEYS}


def _outlive_stop_signals(_worker: int) -> None:
    """Schedulers signal all processes of a job: the rank decides what to do, and needs its data until then."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def train_loader(dataset: Dataset[Sample], sampler: GlobalBatchSampler, *, num_workers: int = 0) -> DataLoader[Sample]:
    """A loader of micro-batches, without state of its own: to resume, make one with a sampler further on."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        timeout=_STALLED_SECONDS if num_workers else 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_outlive_stop_signals,
        # It draws a seed for its workers: from the global generator, that would change the model's dropout.
        generator=torch.Generator(),
    )
