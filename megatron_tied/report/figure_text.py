"""How figures and names are written in reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from megatron_tied.report.history import RunHistory

NOT_LOGGED = "not logged"


def number(value: float | None, form: str = ".4g") -> str:
    """A number, or why there is none."""
    if value is None:
        return NOT_LOGGED
    return format(value, form) if math.isfinite(value) else "not finite"


def percent(share: float) -> str:
    """A share of 1 in percent; one that is not 0 does not look like it."""
    return "below 0.01%" if 0 < share < 1e-4 else number(share, ".2%" if share < 0.1 else ".1%")


def signed(difference: float) -> str:
    """A difference with its sign."""
    return f"{difference:+.4f}"


def bank_name(run: RunHistory, bank: int) -> str:
    """`bank 2 [2 3 4 5]`: its index and, where they are known, its layers."""
    layers = run.layers_of(bank)
    return f"bank {bank}" if layers is None else f"bank {bank} [{' '.join(map(str, layers))}]"


def run_names(directories: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart; the directories must differ."""
    paths = [directory.resolve() for directory in directories]
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def remarks(runs: Sequence[RunHistory]) -> list[str]:
    """What the reader should know about how the runs were read."""
    told = []
    for name, run in zip(run_names([run.directory for run in runs]), runs, strict=True):
        if run.config.problem is not None:
            told.append(f"{name}: {run.config.problem}; its metrics are reported all the same")
        if run.broken_lines:
            lines = "1 broken line" if run.broken_lines == 1 else f"{run.broken_lines:,} broken lines"
            told.append(f"{name}: left out: {lines} of metrics.jsonl")
    return told
