"""Megatron-Core's own DDP, optimizers and pipelines against one process of plain PyTorch."""

from __future__ import annotations

import pytest

from tests.distributed.matrix import LIMITS, Job, reference, run_traces, worst_errors
from tests.megatron_lm.cases import NativeCase

_WORKER = "tests.megatron_lm.ranks.native_worker"


def _check(job: Job, world: int, cases: list[NativeCase]) -> None:
    traces = run_traces(job, world, cases, worker=_WORKER)
    for case, trace in zip(cases, traces, strict=True):
        expected = reference(job, world // case.pp * case.accumulation, case.lr_divisor)
        errors = worst_errors(trace, expected)
        too_large = {name: error for name, error in errors.items() if not error <= LIMITS[name]}
        assert not too_large, f"world {world}, {case}: {too_large}"


_RECOMPUTE = ("none", "full", "moe")
_SHARDED = ((False, False), (True, True))  # distributed optimizer, overlap


@pytest.mark.parametrize("arch", ["olmoe", "qwen3_moe"])
def test_data_and_expert_parallel_equal_plain_pytorch(arch: str) -> None:
    cases = [
        NativeCase(ep=2, distributed_optimizer=distributed, overlap=overlap, recompute=recompute, built="upstream spec")
        for recompute in _RECOMPUTE
        for distributed, overlap in _SHARDED
    ]
    _check(Job(arch), 4, cases)


def test_grouped_experts_accumulate_over_micro_batches() -> None:
    cases = [
        NativeCase(
            ep=2,
            distributed_optimizer=distributed,
            overlap=overlap,
            recompute=recompute,
            accumulation=2,
            lr_divisor="linear",
        )
        for recompute in ("none", "full")
        for distributed, overlap in ((False, True), (True, False), (True, True))
    ]
    _check(Job("olmoe", seed=30), 4, cases)


# Eight layers on two stages. Banks inside the stages; over both; over three of four interleaved chunks, two of them on
# one stage, with another over the last two.
_ALIGNED = (0, 1, 1, 1, 2, 2, 2, 3)
_STRADDLING = (0, 1, 2, 2, 2, 3, 3, 4)
_OVER_CHUNKS = (0, 1, 1, 1, 1, 2, 2, 3)
_PAIRS = (0, 0, 1, 1, 2, 2, 3, 3)
_SEEDS = {_STRADDLING: 24, _OVER_CHUNKS: 27, _PAIRS: 5}


@pytest.mark.parametrize(
    ("banks", "cases"),
    [
        (_ALIGNED, [NativeCase(pp=2, accumulation=2, overlap=True, distributed_optimizer=True, built="upstream spec")]),
        (
            _STRADDLING,
            [
                NativeCase(pp=2, accumulation=2, pipeline="allreduce", overlap=sharded, distributed_optimizer=sharded)
                for sharded in (False, True)
            ],
        ),
        (_PAIRS, [NativeCase(pp=2, vp=2, accumulation=2)]),
        (
            _OVER_CHUNKS,
            [
                NativeCase(pp=2, vp=2, accumulation=4, pipeline="allreduce", built=built, distributed_optimizer=sharded)
                for built, sharded in (("upstream spec", False), ("tied spec", True))
            ],
        ),
    ],
)
def test_pipelines_equal_plain_pytorch(banks: tuple[int, ...], cases: list[NativeCase]) -> None:
    _check(Job("qwen3_moe", banks, seed=_SEEDS.get(banks)), 2, cases)


def test_pipeline_with_sharded_copies() -> None:
    cases = [
        # At EP 1 the distributed optimizer shards a bank over the data parallel ranks, alike in both of its stages.
        NativeCase(
            pp=2, ep=ep, accumulation=2, pipeline="allreduce", overlap=True, distributed_optimizer=True, built=built
        )
        for ep, built in ((1, "tied spec"), (2, "upstream spec"))
    ]
    _check(Job("qwen3_moe", _STRADDLING, seed=_SEEDS[_STRADDLING]), 4, cases)
