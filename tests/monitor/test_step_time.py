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


class Event:
    """A CUDA event of a device that is done when the test says so."""

    done_until = 0.0
    clock = 0.0
    waited = 0

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.at = Event.clock

    def query(self) -> bool:
        return self.at <= Event.done_until

    def synchronize(self) -> None:
        Event.waited += 1
        Event.done_until = max(Event.done_until, self.at)

    def elapsed_time(self, other: Event) -> float:
        return 1000 * (other.at - self.at)


def test_on_a_gpu_only_reading_waits_and_finished_events_are_let_go(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stopwatch.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(stopwatch.torch.cuda, "Event", Event)
    watch = stopwatch.Stopwatch()
    for second in range(100):
        with watch.running():
            Event.clock += 0.5
        Event.clock += 1.0
        Event.done_until = Event.clock - 10.0  # the device is behind
        assert len(watch._events) < 10, second
    assert Event.waited == 0
    assert watch.take() == pytest.approx(50.0)
    assert Event.waited == 1
    assert watch.take() == 0.0
