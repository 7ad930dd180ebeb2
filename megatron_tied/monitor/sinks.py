"""Where metrics go: one JSON object a line here, TensorBoard and Weights & Biases in modules of their own."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from megatron_tied.files import replacing

Metrics = Mapping[str, float]

# expert_load and bank_load: by layer or bank, each expert's tokens in multiples of the mean; agreement: by tied bank,
# the overlap between its layers, row by row.
Tables = Mapping[str, Mapping[str, Sequence[Any]]]

_MOST_UNWRITTEN_BYTES = 1 << 26  # of metrics.jsonl, kept for when there is room

# TensorBoard groups charts by what stands before the slash.
_GROUPS = {
    "loss": "train",
    "lm_loss": "train",
    "perplexity": "train",
    "lr": "train",
    "grad_norm": "train",
    "loss_scale": "train",
    "aux_loss": "moe",
    "z_loss": "moe",
    "validation_loss": "validation",
    "tokens": "progress",
    "tokens_per_second": "progress",
    "planned_tokens_per_second": "progress",
    "step_seconds": "progress",
    "eta_seconds": "progress",
    "memory_gb": "system",
    "memory_allocated_gb": "system",
    "memory_reserved_gb": "system",
    "memory_fullest_gb": "system",
    "states_gb": "system",
    "planned_memory_gb": "system",
    "planned_states_gb": "system",
    "parameters_unique": "model",
    "parameters_untied": "model",
}


class Sink(Protocol):
    """Takes what is known of one step."""

    def write(self, step: int, metrics: Metrics) -> None:
        """Keep `metrics` under `step`."""

    def write_tables(self, step: int, tables: Tables) -> None:
        """Keep `tables` under `step`."""

    def close(self) -> None:
        """Write out what is buffered."""


class JsonLinesSink:
    """`metrics.jsonl`: `step` and the metrics or tables, one object a line, each written as it comes.

    What a full disk has no room for is written when there is room again.
    """

    def __init__(self, path: Path):
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""

    def write(self, step: int, metrics: Metrics) -> None:
        """Append one line; JSON has no infinity or NaN, which become null."""
        self._append({"step": step, **{name: _finite(value) for name, value in metrics.items()}})

    def write_tables(self, step: int, tables: Tables) -> None:
        """Append one line with every table under its name; what is not finite becomes null."""
        self._append({"step": step, **{name: _plain(table) for name, table in tables.items()}})

    def close(self) -> None:
        """Write what is left, and close the file."""
        try:
            self._write_out()
        finally:
            self._file.close()

    def _append(self, line: Mapping[str, Any]) -> None:
        if len(self._unwritten) < _MOST_UNWRITTEN_BYTES:
            self._unwritten += json.dumps(line, allow_nan=False).encode() + b"\n"
        self._write_out()

    def _write_out(self) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]


def forget_metrics_after(step: int, path: Path) -> dict[str, float | None]:
    """Remove from metrics.jsonl what a run has logged that is gone on with after `step`; returns the last values left.

    Tables are removed alike, but not returned. A line that a killed run has written in part is removed too.
    """
    last: dict[str, float | None] = {}
    if not path.is_file():
        return last
    # Line by line: with tables for every layer, the file of a long run does not fit in memory.
    with path.open("rb") as old, replacing(path) as new:
        for line, values in _until(step, old):
            new.write(line.rstrip(b"\r\n") + b"\n")
            last |= {name: value for name, value in values.items() if not isinstance(value, (dict, list))}
    last.pop("step", None)
    return last


class Sinks:
    """All sinks of a run; empty on every rank but the first."""

    def __init__(self, *sinks: Sink):
        self._sinks = sinks
        self._failing: set[Sink] = set()

    def write(self, step: int, metrics: Metrics) -> None:
        """Hand `metrics` to every sink."""
        self._each(f"metrics of step {step}", lambda sink: sink.write(step, metrics))

    def write_tables(self, step: int, tables: Tables) -> None:
        """Hand `tables` to every sink."""
        self._each(f"tables of step {step}", lambda sink: sink.write_tables(step, tables))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._each("the last metrics", lambda sink: sink.close())

    def _each(self, what: str, hand_on: Callable[[Sink], None]) -> None:
        for sink in self._sinks:
            try:
                hand_on(sink)
                self._failing.discard(sink)
            except Exception as error:
                # Neither a full disk nor a chart that cannot be drawn may end a run that can still be saved.
                if sink not in self._failing:
                    text = "%s: %s not written, and what follows may be lost until it works again: %s: %s"
                    logging.getLogger(__name__).warning(text, type(sink).__name__, what, type(error).__name__, error)
                self._failing.add(sink)


def numbered(name: str, index: int) -> str:
    """The metric `name` of one layer or bank: two digits or more, so that names sort."""
    return f"{name}/{index:02d}"


def tensorboard_tag(name: str) -> str:
    """The chart of a metric: `lm_loss` is drawn as `train/lm_loss`; a name with a slash keeps it."""
    if "/" in name:
        return name
    return f"{_GROUPS.get(name, 'other')}/{name}"


def _until(step: int, lines: Iterator[bytes]) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The whole lines up to `step`, as they are and read."""
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and type(values.get("step")) is int and values["step"] <= step:
            yield line, values


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(table: Any) -> Any:
    if isinstance(table, Mapping):
        return {str(key): _plain(row) for key, row in table.items()}
    if isinstance(table, Sequence):
        return [_plain(item) for item in table]
    return _finite(table)
