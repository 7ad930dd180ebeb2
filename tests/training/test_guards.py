"""What is said and done when a step, or the replicas of a parameter, are not sound."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_tied.errors import TrainingStopped
from megatron_tied.training import guards


@pytest.mark.parametrize(
    ("every", "step", "is_looked_at"), [(0, 4, False), (1, 1, True), (1, 2, True), (2, 3, False), (2, 4, True)]
)
def test_replicas_that_differ_end_the_run_when_they_are_looked_at(
    every: int, step: int, is_looked_at: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(guards, "find_differences", lambda model: asked.append(model) or ["weight", "bias"])
    engine, settings = SimpleNamespace(module="model"), SimpleNamespace(check_consistency_every=every)
    if is_looked_at:
        with pytest.raises(TrainingStopped, match=rf"step {step}: ranks that must hold the same .*: weight, bias$"):
            guards.check_consistency(engine, step, settings)
    else:
        guards.check_consistency(engine, step, settings)
    assert asked == ["model"] * is_looked_at


def test_replicas_that_agree_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "find_differences", lambda model: [])
    guards.check_consistency(SimpleNamespace(module=None), 1, SimpleNamespace(check_consistency_every=1))
