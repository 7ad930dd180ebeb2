"""Where metrics go: one JSON object a line, and TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

Metrics = Mapping[str, float]

# TensorBoard groups charts by what stands before the slash.
_GROUPS = {
    "loss": "train",
    "lm_loss": "train",
    "lr": "train",
    "grad_norm": "train",
    "aux_loss": "moe",
    "z_loss": "moe",
    "validation_loss": "validation",
    "validation_perplexity": "validation",
    "tokens": "progress",
    "tokens_per_second": "progress",
    "step_seconds": "progress",
    "memory_gb": "system",
}


class Sink(Protocol):
    """Takes the metrics of one step."""

    def write(self, step: int, metrics: Metrics) -> None:
        """Keep `metrics` under `step`."""

    def close(self) -> None:
        """Write out what is buffered."""


class JsonLinesSink:
    """`metrics.jsonl`: `step` and the metrics, one object a line, each flushed as it comes."""

    def __init__(self, path: Path):
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Metrics) -> None:
        """Append one line; JSON has no infinity or NaN, which become null."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardSink:
    """Scalars under `train/`, `moe/`, `lr/`, `validation/`, `progress/` and `system/`."""

    def __init__(self, directory: Path):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), flush_secs=30)

    def write(self, step: int, metrics: Metrics) -> None:
        """Add one point to each metric's chart."""
        for name, value in metrics.items():
            self._writer.add_scalar(tensorboard_tag(name), value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class Sinks:
    """All sinks of a run; empty on every rank but the first."""

    def __init__(self, *sinks: Sink):
        self._sinks = sinks

    def write(self, step: int, metrics: Metrics) -> None:
        """Hand `metrics` to every sink."""
        for sink in self._sinks:
            sink.write(step, metrics)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in self._sinks:
            sink.close()


def tensorboard_tag(name: str) -> str:
    """The chart of a metric: `lm_loss` is drawn as `train/lm_loss`; a name with a slash keeps it."""
    if "/" in name:
        return name
    return f"{_GROUPS.get(name, 'other')}/{name}"
