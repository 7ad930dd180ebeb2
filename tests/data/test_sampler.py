from __future__ import annotations

import time

import pytest
import torch
from torch.utils.data import Dataset

from megatron_tied.data.sampler import GlobalBatchSampler, collate, train_loader
from megatron_tied.errors import ConfigError
from megatron_tied.training.exits import end_workers


class Numbers(Dataset):
    """Sample i holds the number i."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.full((4,), index)
        return {
            "tokens": tokens,
            "labels": tokens + 1,
            "loss_mask": torch.ones(4),
            "position_ids": torch.arange(4),
            "dataset_id": torch.tensor(0),
        }


def sampler(consumed: int = 0, rank: int = 0, size: int = 1, micro: int = 2, total: int = 48) -> GlobalBatchSampler:
    return GlobalBatchSampler(
        num_samples=total,
        consumed_samples=consumed,
        micro_batch_size=micro,
        global_batch_size=12,
        dp_rank=rank,
        dp_size=size,
    )


def test_micro_batches_are_dealt_to_the_ranks_in_turn() -> None:
    assert list(sampler(12, rank=1, size=3, total=36)) == [[14, 15], [20, 21], [26, 27], [32, 33]]


@pytest.mark.parametrize(("size", "micro"), [(1, 1), (1, 12), (2, 3), (3, 2), (6, 1), (6, 2)])
def test_the_global_batch_is_the_same_whatever_the_ranks(size: int, micro: int) -> None:
    ranks = [list(sampler(12, rank, size, micro)) for rank in range(size)]
    steps = 12 // (size * micro)
    for batch in range(3):
        drawn = [index for rank in ranks for part in rank[batch * steps : (batch + 1) * steps] for index in part]
        assert sorted(drawn) == list(range(12 + 12 * batch, 24 + 12 * batch))
    assert [len(sampler(12, rank, size, micro)) for rank in range(size)] == [3 * steps] * size


def test_resuming_goes_on_where_the_run_stopped() -> None:
    run = list(sampler(0, rank=1, size=2))
    assert list(sampler(24, rank=1, size=2)) == run[len(run) // 2 :]


def test_a_rest_is_no_batch() -> None:
    assert [index for part in sampler(total=30) for index in part] == list(range(24))
    assert list(sampler(36, total=30)) == []


def test_a_global_batch_that_the_ranks_cannot_share() -> None:
    with pytest.raises(ConfigError, match=r"train.global_batch_size = 12: must be a multiple of 5 \* 2"):
        sampler(micro=5, size=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_yields_tensors_in_the_samplers_order(workers: int) -> None:
    batches = list(train_loader(Numbers(), sampler(24, rank=1, size=2), num_workers=workers))
    assert [batch["tokens"][:, 0].tolist() for batch in batches] == list(sampler(24, rank=1, size=2))
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batches[0].items()} == {
        "tokens": (torch.int64, (2, 4)),
        "labels": (torch.int64, (2, 4)),
        "loss_mask": (torch.float32, (2, 4)),
        "position_ids": (torch.int64, (2, 4)),
    }


class Stalled(Numbers):
    """A file system that no longer answers."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index > 0:
            time.sleep(1000)
        return super().__getitem__(index)


def test_a_process_that_delivers_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_tied.data.sampler._STALLED_SECONDS", 1)
    batches = iter(train_loader(Stalled(), sampler(micro=1), num_workers=1))
    next(batches)
    with pytest.raises(RuntimeError, match="timed out after 1 seconds"):
        next(batches)
    end_workers()


def test_loading_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    next(iter(train_loader(Numbers(), sampler())))
    assert torch.rand(1) == expected


def test_collate_keeps_rows_apart() -> None:
    batch = collate([Numbers()[3], Numbers()[5]])
    assert batch["labels"].tolist() == [[4] * 4, [6] * 4]
