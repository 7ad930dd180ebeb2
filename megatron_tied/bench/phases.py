"""The phases of a contender's steps: which one it is in, and how long each takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from megatron_tied.monitor.step_time import StepTime


class Phases:
    """Stands where a run has its `Monitoring`, and times phases only.

    `current` is the innermost phase that a step is in. `when_reduced` is called between backward and the update.
    """

    def __init__(self) -> None:
        self._step_time = StepTime()
        self.current: str | None = None
        self.when_reduced: Callable[[], None] = _nothing

    def forward(self) -> AbstractContextManager[None]:
        """Around a micro-batch's forward pass."""
        return self.phase("forward")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around any other part of a step; see `StepTime`."""
        outer, self.current = self.current, name
        try:
            with self._step_time.phase(name):
                yield
        finally:
            self.current = outer

    def before_update(self) -> None:
        """After the last backward pass of a step."""
        self.when_reduced()

    def take(self, steps: int, seconds: float) -> dict[str, float]:
        """Seconds of a step by phase since the last call, of `steps` steps that took `seconds`."""
        times = self._step_time.take(steps, seconds)
        return {name.removeprefix("time/"): value for name, value in times.items()}


def _nothing() -> None:
    return None
