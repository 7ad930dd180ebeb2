"""Megatron-Core's distributed checkpoints of tied models: every bank once, loaded in any layout."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.distributed.launch import launch
from tests.distributed.matrix import Job, material
from tests.megatron_lm.cases import NativeCase

_BANKS = (0, 1, 2, 2, 2, 3, 3, 4)
_EXPERTS = re.compile(r"decoder\.layers\.(\d+)\.mlp\.experts\.experts\.linear_fc[12]\.weight")


def _close(found: dict, expected: dict, what: str) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{what} {n}: {text}"
        )


# Megatron-Core keeps experts in an optimizer of their own as soon as EP > 1: its state goes from one EP to another, not
# from EP 1.
@pytest.mark.parametrize(
    ("world", "saver", "cases"),
    [
        (
            4,
            NativeCase(ep=2, distributed_optimizer=True, overlap=True),
            [
                NativeCase(ep=4, distributed_optimizer=True),
                NativeCase(ep=2, pp=2, accumulation=2, distributed_optimizer=True, pipeline="allreduce"),
                NativeCase(ep=2, pp=2, vp=2, accumulation=2, distributed_optimizer=True, pipeline="allreduce"),
            ],
        ),
        (
            2,
            NativeCase(pp=2, accumulation=4, pipeline="allreduce", built="upstream spec"),
            [
                NativeCase(accumulation=2),
                NativeCase(pp=2, accumulation=4, pipeline="allreduce", built="upstream spec"),
            ],
        ),
    ],
)
def test_a_checkpoint_holds_a_bank_once_and_goes_on_in_any_layout(
    world: int, saver: NativeCase, cases: list[NativeCase], tmp_path: Path
) -> None:
    job = {**material(Job("qwen3_moe", _BANKS, steps=4)), "saver": saver, "cases": cases}
    torch.save({**job, "directory": str(tmp_path / "checkpoint")}, tmp_path / "job")
    launch("tests.megatron_lm.ranks.checkpoint_worker", world, str(tmp_path / "job"), str(tmp_path / "result"))
    (uninterrupted, *resumed), tensors = torch.load(tmp_path / "result", weights_only=False)

    owners = {_BANKS.index(bank) for bank in _BANKS}
    found = {name: int(match[1]) for name in tensors if (match := _EXPERTS.fullmatch(name))}
    assert set(found.values()) == owners
    assert len(found) == 2 * len(owners)
    # [experts, 2 ffn, hidden], whatever kind of experts has saved them.
    assert tuple(tensors["decoder.layers.2.mlp.experts.experts.linear_fc1.weight"]) == (8, 64, 64)

    for case, trace in zip(cases, resumed, strict=True):
        for step, expected in zip(trace["steps"], uninterrupted["steps"], strict=True):
            assert step == pytest.approx(expected, rel=1e-5), case
        _close(trace["gradients"], uninterrupted["gradients"], f"{case}: gradient of")
        _close(trace["weights"], uninterrupted["weights"], f"{case}: weight")
