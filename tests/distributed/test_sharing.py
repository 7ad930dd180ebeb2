"""Attention and routers that a tie group shares, on real ranks against one process of plain PyTorch."""

from __future__ import annotations

from tests.distributed.matrix import LIMITS, Job, run_cases
from tests.distributed.training_run import Case

BANKS = (0, 1, 2, 1, 2, 1, 3)  # cyclic, and not all banks of one size
STAGES = [Case(ep=2, stage=stage) for stage in (1, 2, 3)]
# Where a gradient hook fires once for each use, and ZeRO may have the gradient after the last one only.
RECOMPUTE = [
    Case(ep=2, stage=1, recompute="full", overlap=True),
    Case(ep=2, stage=2, recompute="moe", accumulation=2),
    Case(ep=2, stage=3, recompute="full", accumulation=2),
    Case(ep=2, stage=3, recompute="non_reentrant", lr_divisor="linear"),
    Case(tp=2, ep=2, stage=2, recompute="full"),
]


def assert_right(job: Job, world: int, cases: list[Case]) -> None:
    for case, errors in zip(cases, run_cases(job, world, cases), strict=True):
        too_large = {name: error for name, error in errors.items() if not error <= LIMITS[name]}
        assert not too_large, f"{job}, {case}: {too_large}"


def test_attention_and_router() -> None:
    assert_right(Job("olmoe", BANKS, steps=3, share="all"), 2, [*STAGES, *RECOMPUTE])


def test_attention() -> None:
    assert_right(Job("olmoe", BANKS, steps=3, share="experts_attention"), 2, STAGES)


def test_on_one_rank() -> None:
    assert_right(Job("qwen3_moe", steps=3, share="experts_attention"), 1, [Case(stage=0), Case(stage=3)])


def test_latent_attention() -> None:
    assert_right(Job("deepseek_v2", steps=3, share="all"), 2, [Case(ep=2, stage=3, recompute="mla_up_proj")])
