"""What is wrong with the input: which field, which value, what would be valid; and how a message lists names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the input: the dotted `field`, its `value`, and what would be `valid`."""

    field: str
    value: object
    valid: str

    def __str__(self) -> str:
        return f"{self.field} = {self.value!r}: {self.valid}"


class ConfigError(ValueError):
    """Bad input, found before any model is built. Holds every problem, not only the first."""

    def __init__(self, problems: Problem | Iterable[Problem]):
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says at which step, why, and what to do. Raised on every rank alike."""


def listed(names: Sequence[object], most: int = 8) -> str:
    """Names for a message, not endlessly many: `node0, node1 and 30 more`."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{', '.join(map(str, names[:most]))}{more}"
