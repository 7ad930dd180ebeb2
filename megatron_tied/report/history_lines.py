"""metrics.jsonl as series: what any reader of the file wants, in little memory."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_TOLD_EVERY = 1 << 20  # bytes
_LARGEST_STEP = 2**63 - 1  # of an int64


class Point(NamedTuple):
    """One value of a metric; not finite where the run logged null."""

    step: int
    value: float


class Series(NamedTuple):
    """A metric over the steps: steps [n] int64, ascending, each once; values [n] float64, NaN for a logged null."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    def point(self, index: int) -> Point:
        """The point at this place in the order of steps."""
        return Point(int(self.steps[index]), float(self.values[index]))

    def finite(self) -> Series | None:
        """The finite values; None if there are none."""
        finite = np.isfinite(self.values)
        return Series(self.steps[finite], self.values[finite]) if finite.any() else None

    def settled(self) -> float:
        """The median of the last half of the values: start-up is left out."""
        return float(np.median(self.values[len(self.values) // 2 :]))


class Table(NamedTuple):
    """A table as it was last logged, by number of the layer or bank (as text): lists of numbers, or lists of such."""

    step: int
    content: Mapping[str, Any]


class Lines(NamedTuple):
    """All that could be read, and the number of lines that could not."""

    series: Mapping[str, Series]
    tables: Mapping[str, Table]
    broken: int


_Collected = dict[str, tuple["array[int]", "array[float]"]]  # steps and values by metric


def read_lines(path: Path, on_read: Callable[[int], object] = lambda size: None) -> Lines:
    """Read a metrics.jsonl, which may be growing. Of lines of one step the later wins, for each metric alone.

    `on_read` is told now and then how many bytes have been read since it was last told. Raises OSError.
    """
    collected: _Collected = {}
    tables: dict[str, Table] = {}
    broken = untold = 0
    with path.open("rb") as stream:
        for line in stream:
            untold += len(line)
            if untold >= _TOLD_EVERY:
                on_read(untold)
                untold = 0
            if not line.strip():
                continue
            metrics = _parse(line)
            if metrics is None:
                broken += 1
            else:
                _collect(metrics, collected, tables)
    on_read(untold)
    # One after the other out of the dict: arrays and series of all metrics at once would double the memory.
    series = {name: _series(*collected.pop(name)) for name in list(collected)}
    return Lines(series, tables, broken)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object of a line with a step; None for anything else, such as half a line at the end of a live run."""
    try:
        metrics = json.loads(line, parse_int=_integer)
    except (ValueError, OverflowError):
        return None
    if not isinstance(metrics, dict) or type(step := metrics.get("step")) is not int:
        return None
    return metrics if 0 <= step <= _LARGEST_STEP else None


def _integer(text: str) -> int:
    """Raises OverflowError for what no float can hold."""
    value = int(text)
    float(value)
    return value


def _collect(metrics: dict[str, Any], collected: _Collected, tables: dict[str, Table]) -> None:
    step = metrics.pop("step")
    for name, value in metrics.items():
        if value is None or type(value) in (float, int):
            if name not in collected:
                collected[name] = array("q"), array("d")
            steps, values = collected[name]
            steps.append(step)
            values.append(math.nan if value is None else value)
        elif isinstance(value, dict) and (name not in tables or step >= tables[name].step):
            tables[name] = Table(step, value)


def _series(steps: array[int], values: array[float]) -> Series:
    step_array, value_array = np.frombuffer(steps, np.int64), np.frombuffer(values, np.float64)
    if (np.diff(step_array) > 0).all():
        return Series(step_array, value_array)
    order = np.argsort(step_array, kind="stable")
    step_array, value_array = step_array[order], value_array[order]
    is_last = np.append(np.diff(step_array) > 0, True)
    return Series(step_array[is_last], value_array[is_last])
