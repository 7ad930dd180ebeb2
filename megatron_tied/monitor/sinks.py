"""Where metrics go: one JSON object a line, and TensorBoard."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from megatron_tied.files import write_whole

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
    "states_gb": "system",
    "planned_memory_gb": "system",
    "planned_states_gb": "system",
    "planned_tokens_per_second": "progress",
}


METRICS = "metrics.jsonl"


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


def forget_metrics_after(step: int, path: Path) -> dict[str, Any]:
    """Remove from metrics.jsonl what a run has logged that is gone on with after `step`; returns the last values left.

    A line that a killed run has written in part is removed too.
    """
    kept: list[dict[str, Any]] = []
    if not path.is_file():
        return {}
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            kept.append(json.loads(line))
    kept = [metrics for metrics in kept if metrics["step"] <= step]
    write_whole(path, "".join(json.dumps(metrics) + "\n" for metrics in kept))
    return {name: value for metrics in kept for name, value in metrics.items() if name != "step"}


class TensorBoardSink:
    """Scalars under `train/`, `moe/`, `lr/`, `validation/`, `progress/` and `system/`, new after step `done`."""

    def __init__(self, directory: Path, done: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), flush_secs=30, purge_step=done + 1)

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
            try:
                sink.write(step, metrics)
            except OSError as error:
                # A full disk must not end a run that may still be saved elsewhere, or when there is space again.
                logging.getLogger(__name__).warning("metrics of step %d were not written: %s", step, error)

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
