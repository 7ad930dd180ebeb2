"""Where the time of a step goes."""

from __future__ import annotations

from contextlib import AbstractContextManager

from megatron_tied.monitor.stopwatch import Stopwatch

PHASES = ("data", "forward", "backward", "reduce", "optimizer")


class StepTime:
    """Times the phases of training steps on this rank.

    backward is what is left of it without reduce, the part of gradient reduction that comes after backward has
    ended; what overlaps with backward, or runs between its layers, is backward's.
    """

    def __init__(self) -> None:
        self._stopwatches = {name: Stopwatch() for name in PHASES}

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time spent in this context belongs to the phase `name`, one of `PHASES`; reduce lies inside of backward."""
        return self._stopwatches[name].running()

    def take(self, steps: int, seconds: float) -> dict[str, float]:
        """time/data ... time/optimizer and time/other: seconds a step since the last call, of `steps` steps.

        seconds: what all of them took; what no phase accounts for is other.
        """
        times = {name: stopwatch.take() / steps for name, stopwatch in self._stopwatches.items()}
        times["backward"] -= times["reduce"]
        times["other"] = max(0.0, seconds / steps - sum(times.values()))
        return {f"time/{name}": value for name, value in times.items()}
