"""The whole stack on real ranks against one process of plain PyTorch: losses, every gradient, final weights."""

from __future__ import annotations

import pytest

from tests.distributed.matrix import ARCHITECTURES, LIMITS, Job, run_cases
from tests.distributed.training_run import Case

# Every (world, EP), ZeRO stage, accumulation, expert backend and dispatcher of the matrix at least once.
SUBSET = {
    1: [Case(stage=0), Case(stage=3, accumulation=2)],
    2: [
        Case(stage=2, accumulation=2),
        Case(ep=2, stage=0, accumulation=2),
        Case(ep=2, stage=1),
        Case(ep=2, stage=3),
        Case(ep=2, stage=2, backend="sequential", dispatcher="allgather"),
        Case(ep=2, stage=1, dispatcher="allgather", lr_divisor="linear"),
    ],
    4: [
        Case(ep=2, stage=0),
        Case(ep=2, stage=3, accumulation=2),
        Case(ep=4, stage=1, accumulation=2),
        Case(ep=4, stage=2),
    ],
}
# Latent attention, with what is its own: down projections that tensor parallel ranks share, and ways to recompute.
LATENT = [
    Case(stage=0, accumulation=2),
    Case(ep=2, stage=1, recompute="core_attn"),
    Case(ep=2, stage=2, recompute="full"),
    Case(ep=2, stage=3, recompute="mla_up_proj"),
    Case(tp=2, stage=1),
    Case(tp=2, ep=2, stage=3, recompute="mla_up_proj"),
]


@pytest.mark.parametrize("world", SUBSET)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_equals_plain_pytorch(arch: str, world: int) -> None:
    for case, errors in zip(SUBSET[world], run_cases(Job(arch), world, SUBSET[world]), strict=True):
        too_large = {name: error for name, error in errors.items() if not error <= LIMITS[name]}
        assert not too_large, f"{arch}, world {world}, {case}: {too_large}"


def test_latent_attention_equals_plain_pytorch() -> None:
    for case, errors in zip(LATENT, run_cases(Job("deepseek_v2", steps=4), 2, LATENT), strict=True):
        too_large = {name: error for name, error in errors.items() if not error <= LIMITS[name]}
        assert not too_large, f"{case}: {too_large}"
