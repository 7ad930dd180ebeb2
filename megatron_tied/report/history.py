"""What one training run has logged, read from its directory, also while the run is going on."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.report.history_lines import Lines, Point, Series, Table, read_lines
from megatron_tied.run_directory import CONFIG, METRICS, SUMMARY, run_inside
from megatron_tied.topology import Bank, TieTopology

# A run that has logged nothing for so many of its usual intervals, and at least for so many seconds, has stopped:
# between two log lines there may be an evaluation and a checkpoint.
_INTERVALS, _SILENCE_SECONDS = 4, 600

TopologyOf = Callable[[Path], TieTopology]


@dataclass(frozen=True)
class RunConfigText:
    """A run's config.yaml: its text, the plain values in it (empty if it is no YAML mapping), and its topology.

    problem: why this version cannot read the config, so that `topology` is None; None if it can.
    """

    text: str
    values: Mapping[str, Any]
    topology: TieTopology | None
    problem: str | None


@dataclass(frozen=True)
class RunHistory:
    """One run. series: the scalar metrics by name; tables: the last table by name; written: when, in Unix time."""

    directory: Path
    series: Mapping[str, Series]
    tables: Mapping[str, Table]
    broken_lines: int
    config: RunConfigText
    summary: Mapping[str, Any]
    written: float

    def last(self, name: str) -> Point | None:
        """The last point of a metric; None if it was never logged."""
        series = self.series.get(name)
        return None if series is None else series.point(-1)

    def finite(self, name: str) -> Series | None:
        """The finite values of a metric; None if there are none."""
        series = self.series.get(name)
        return None if series is None else series.finite()

    def best(self, name: str) -> Point | None:
        """The point of a metric's least finite value, the first of equals."""
        finite = self.finite(name)
        return None if finite is None else finite.point(int(finite.values.argmin()))

    def settled(self, name: str) -> float | None:
        """The median of the finite values of the last half of a metric's points: start-up is left out."""
        finite = self.finite(name)
        return None if finite is None else finite.settled()

    def numbered(self, prefix: str) -> dict[int, Point]:
        """The last points of `prefix`/NN by number, a layer's or a bank's, in order."""
        numbers = (name.removeprefix(f"{prefix}/") for name in self.series if name.startswith(f"{prefix}/"))
        return {
            int(number): self.series[f"{prefix}/{number}"].point(-1)
            for number in sorted((number for number in numbers if number.isdecimal()), key=int)
        }

    @property
    def last_step(self) -> int:
        """The last step of which anything is logged."""
        return max(int(series.steps[-1]) for series in self.series.values())

    @property
    def planned_steps(self) -> int | None:
        """How many steps the run is to have; None if neither its config nor its summary says so."""
        section = self.config.values.get("train")
        planned = section.get("steps") if isinstance(section, Mapping) else None
        planned = self.summary.get("steps") if planned is None else planned
        return planned if isinstance(planned, int) else None

    def state(self, now: float | None = None) -> str:
        """Whether the run is "finished", "stopped" or "still running" at Unix time `now`, told from its files."""
        if self.summary and self.last_step >= (self.planned_steps or 0):
            return "finished"
        silence = (time.time() if now is None else now) - self.written
        return "stopped" if silence > max(_SILENCE_SECONDS, _INTERVALS * self._interval_seconds()) else "still running"

    def _interval_seconds(self) -> float:
        step_seconds, loss = self.last("step_seconds"), self.series.get("loss")
        if step_seconds is None or loss is None or not math.isfinite(step_seconds.value):
            return 0.0
        return step_seconds.value * float(np.diff(loss.steps, prepend=0).max())

    @property
    def topology(self) -> TieTopology | None:
        """Which layer uses which bank; None where this version cannot read the config."""
        return self.config.topology

    @property
    def topology_line(self) -> str | None:
        """The topology for people, from the config or else from the summary."""
        if self.topology is not None:
            return self.topology.describe()
        line = self.summary.get("topology")
        return line if isinstance(line, str) else None

    def layers_of(self, bank: int) -> tuple[int, ...] | None:
        """The layers that use a bank; None where they are not known."""
        banks = () if self.topology is None else self.topology.banks
        return banks[bank].layers if bank < len(banks) else None

    @property
    def tied_banks(self) -> tuple[Bank, ...]:
        """The banks that more than one layer uses; empty, too, where the topology is not known."""
        return () if self.topology is None else tuple(bank for bank in self.topology.banks if bank.is_tied)


def read_history(
    directory: Path, topology_of: TopologyOf, on_read: Callable[[int], object] = lambda size: None
) -> RunHistory:
    """Read the run in `directory`. `topology_of` reads the topology out of a config file and may raise ConfigError.

    `on_read` is called with the number of bytes of metrics.jsonl that were read since the last call. Raises
    ConfigError where there is no run with at least one metric.
    """
    metrics = directory / METRICS
    try:
        lines = read_lines(metrics, on_read)
        written = metrics.stat().st_mtime
    except OSError as error:
        valid = f"must hold {METRICS} that can be read: {error.strerror}"
        raise ConfigError(Problem("RUN_DIR", str(directory), valid)) from None
    if not lines.series:
        valid = f"must hold {METRICS} with at least one metric: {_found(lines)}"
        raise ConfigError(Problem("RUN_DIR", str(directory), valid))
    config, summary = _read_config(directory / CONFIG, topology_of), _read_summary(directory / SUMMARY)
    return RunHistory(directory, lines.series, lines.tables, lines.broken, config, summary, written)


def find_problem(directory: Path) -> Problem | None:
    """What is to be seen against a run directory without reading it."""
    if not directory.is_dir():
        return Problem("RUN_DIR", str(directory), "must be a directory")
    if not (directory / METRICS).is_file():
        elsewhere = f", but in {run}" if (run := run_inside(directory)) else ""
        valid = f"must be the directory of a run: there is no {METRICS} in it{elsewhere}"
        return Problem("RUN_DIR", str(directory), valid)
    return None


def _found(lines: Lines) -> str:
    return f"none of its {lines.broken:,} lines can be read" if lines.broken else "it has none"


def _read_config(path: Path, topology_of: TopologyOf) -> RunConfigText:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return RunConfigText("", {}, None, f"{CONFIG} cannot be read: {getattr(error, 'strerror', error)}")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        values = None
    values = values if isinstance(values, dict) else {}
    try:
        return RunConfigText(text, values, topology_of(path), None)
    except ConfigError as error:
        return RunConfigText(text, values, None, f"this version cannot read {CONFIG}: {error.problems[0]}")


def _read_summary(path: Path) -> Mapping[str, Any]:
    try:
        summary = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}
