"""Recompute, overlap and accumulation: gradients of every parameter against plain PyTorch, and what breaks them."""

from __future__ import annotations

import pytest

from tests.distributed.matrix import LIMITS, Job, regime_cases, regime_job, run_cases, run_traces, worst_errors
from tests.distributed.matrix import reference as oracle
from tests.distributed.training_run import Case

WORLD = 2
# Each recompute with each ZeRO stage where it is hardest, and the rarer kinds of recompute and experts.
REGIMES = [
    *regime_cases(accumulations=(3,), overlaps=(True,)),
    Case(ep=2, stage=3, recompute="moe_act"),
    Case(ep=2, stage=2, recompute="layernorm"),
    Case(ep=2, stage=3, recompute="block", accumulation=3),
    Case(ep=2, stage=2, recompute="full_by_5"),
    Case(ep=2, stage=1, recompute="full", backend="sequential", overlap=True),
    Case(ep=2, stage=2, recompute="block", backend="sequential"),
    Case(ep=2, stage=3, recompute="full", backend="sequential", accumulation=3),
]


def _assert_right(job: Job, cases: list[Case]) -> None:
    for case, errors in zip(cases, run_cases(job, WORLD, cases), strict=True):
        too_large = {name: error for name, error in errors.items() if not error <= LIMITS[name]}
        assert not too_large, f"{job}, {case}: {too_large}"


def test_gradients_are_right_in_every_regime() -> None:
    _assert_right(regime_job(3), REGIMES)


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [2, 3])
def test_the_full_table(group_size: int) -> None:
    _assert_right(regime_job(group_size), regime_cases())


def test_without_our_accumulation_recompute_loses_gradients_or_fails() -> None:
    job = regime_job(3)
    harmless = [Case(ep=2, stage=3), Case(ep=2, stage=1, recompute="full")]
    # ZeRO 3 says nothing; ZeRO 2 asserts.
    cases = [*harmless, Case(ep=2, stage=3, recompute="full"), Case(ep=2, stage=2, recompute="full")]
    traces = run_traces(job, WORLD, cases, without_accumulation=True)
    expected = oracle(job, WORLD, "sqrt")
    for trace in traces[:2]:
        assert worst_errors(trace, expected)["last gradient"] <= LIMITS["last gradient"]
    silent = worst_errors(traces[2], expected)
    assert silent["first gradient"] > 0.1
    assert "already been reduced" in traces[3]["assertion"]
