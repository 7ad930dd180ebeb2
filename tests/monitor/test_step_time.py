"""Where the time of a step goes, by a clock that the test turns."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_tied.monitor import stopwatch
from megatron_tied.monitor.step_time import StepTime


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(stopwatch.torch.cuda, "is_available", lambda: False)
    return clock


def spend(times: StepTime, clock: SimpleNamespace, phase: str, seconds: float) -> None:
    with times.phase(phase):
        clock.now += seconds


def test_means_over_steps_and_what_is_left(clock: SimpleNamespace):
    times = StepTime()
    for _ in range(2):
        spend(times, clock, "data", 1.0)
        spend(times, clock, "forward", 2.0)
        with times.phase("backward"):
            clock.now += 4.0
            spend(times, clock, "reduce", 3.0)
        spend(times, clock, "optimizer", 1.0)
    assert times.take(2, 26.0) == {
        "time/data": 1.0,
        "time/forward": 2.0,
        "time/backward": 4.0,
        "time/reduce": 3.0,
        "time/optimizer": 1.0,
        "time/other": 2.0,
    }


def test_what_was_taken_is_forgotten(clock: SimpleNamespace):
    times = StepTime()
    spend(times, clock, "forward", 5.0)
    times.take(1, 5.0)
    assert set(times.take(1, 0.0).values()) == {0.0}


def test_a_phase_that_fails_counts(clock: SimpleNamespace):
    times = StepTime()

    def fail() -> None:
        with times.phase("data"):
            clock.now += 1.0
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert times.take(1, 1.0)["time/data"] == 1.0
