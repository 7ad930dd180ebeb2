"""Trains the rows of a grid: every config given, once for every seed, each in a run directory of its own.

    python examples/paper/run_grid.py examples/paper/configs/main/olmoe-tiny-*.yaml --runs runs/paper --seeds 1 2 3 \\
        [--jobs N] [--launch COMMAND] [section.field=value ...]

What is finished is skipped, and what was interrupted goes on after its last checkpoint: after a crash or Ctrl-C type
the same again. A row that fails is told with its log, and the others are trained all the same.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from megatron_tied.cli.report import BAD_INPUT, report
from megatron_tied.errors import ConfigError, Problem
from megatron_tied.run_directory import METRICS, SUMMARY
from megatron_tied.supervision.lock import Lock
from megatron_tied.training.config_file import load_config

POLL_SECONDS = 1.0
INTERRUPTED = 130
_TAIL = 1 << 16  # bytes of metrics.jsonl that hold its last line with a loss


@dataclass(frozen=True)
class GridRow:
    """One training: of `config` with `overrides`, which say where it goes, for `steps` steps."""

    name: str
    config: Path
    overrides: Sequence[str]
    run_dir: Path
    steps: int

    @property
    def is_finished(self) -> bool:
        """Whether its last step is done."""
        return (self.run_dir / SUMMARY).exists()

    @property
    def log(self) -> Path:
        """What it printed, beside its run directory."""
        return self.run_dir.with_suffix(".log")

    def figures(self) -> tuple[int, float | None]:
        """The last step that was logged, and its loss."""
        try:
            with (self.run_dir / METRICS).open("rb") as stream:
                stream.seek(max(0, stream.seek(0, 2) - _TAIL))
                lines = stream.read().splitlines()
        except OSError:
            return 0, None
        for line in reversed(lines):
            try:
                metrics = json.loads(line)
            except ValueError:  # half a line, at either end
                continue
            if "loss" in metrics:
                return metrics["step"], metrics["loss"]
        return 0, None


def rows_of(configs: Sequence[Path], runs: Path, seeds: Sequence[int], overrides: Sequence[str]) -> list[GridRow]:
    """All rows, those of the first seed first. Raises ConfigError for unreadable configs and for names used twice."""
    if twice := {path.stem for path in configs if sum(path.stem == other.stem for other in configs) > 1}:
        valid = "must have names of their own: a run directory has the name of its config"
        raise ConfigError(Problem("CONFIG", sorted(twice), valid))
    rows = []
    for seed in seeds:
        for path in configs:
            name = f"{path.stem}-seed{seed}"
            given = [*overrides, f"train.seed={seed}", f"train.run_dir={runs / name}"]
            rows.append(GridRow(name, path, given, runs / name, load_config(path, given).train.steps))
    return rows


class Grid:
    """Trains rows, `jobs` at a time, by `launch`, and shows how far all of them are."""

    def __init__(self, rows: Sequence[GridRow], launch: Sequence[str], jobs: int):
        self._rows, self._launch, self._jobs = rows, launch, jobs
        self._stopping = threading.Event()
        self._failed: list[str] = []
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True, highlight=False),
        )

    def stop(self, signum: int, frame: FrameType | None) -> None:
        """Have rows save and end, and begin no other."""
        self._stopping.set()

    def train(self) -> int:
        """Train what is not finished; returns the exit code."""
        ends = sum(row.is_finished for row in self._rows)
        with self._progress, ThreadPoolExecutor(self._jobs) as pool:
            every = self._progress.add_task("all rows", total=len(self._rows), completed=ends, note="")
            list(pool.map(lambda row: self._train_row(row, every), [r for r in self._rows if not r.is_finished]))
        if self._stopping.is_set():
            print("interrupted: type the same again to go on", file=sys.stderr)
            return INTERRUPTED
        if self._failed:
            print(f"failed: {', '.join(self._failed)}", file=sys.stderr)
        return 1 if self._failed else 0

    def _train_row(self, row: GridRow, every: TaskID) -> None:
        if self._stopping.is_set():
            return
        task = self._progress.add_task(row.name, total=row.steps, completed=row.figures()[0], note="starting")
        try:
            with Lock(row.run_dir) as lock, row.log.open("ab") as log:
                # The process holds the lock, too: if this one is killed, none trains into the directory beside it.
                command = [*self._launch, "--config", str(row.config), *row.overrides]
                process = subprocess.Popen(
                    command, stdout=log, stderr=log, start_new_session=True, pass_fds=[lock.fileno()]
                )
                self._watch(row, process, task)
        except (ConfigError, OSError) as error:
            self._fail(row, str(error))
        else:
            if row.is_finished:
                self._progress.console.print(f"{row.name}: finished, loss {row.figures()[1]:.4f}")
            elif not self._stopping.is_set():
                self._fail(row, f"exit code {process.returncode}, see {row.log}")
        self._progress.remove_task(task)
        self._progress.update(every, completed=sum(row.is_finished for row in self._rows))

    def _watch(self, row: GridRow, process: subprocess.Popen[bytes], task: TaskID) -> None:
        told = False
        while process.poll() is None:
            if self._stopping.is_set() and not told:
                process.send_signal(signal.SIGTERM)  # it saves, and ends
                told = True
            step, loss = row.figures()
            note = "" if loss is None else f"loss {loss:.4f}"
            self._progress.update(task, completed=step, note="saving" if told else note)
            time.sleep(POLL_SECONDS)

    def _fail(self, row: GridRow, why: str) -> None:
        self._failed.append(row.name)
        self._progress.console.print(f"{row.name}: failed: {why}")


def main(argv: Sequence[str] | None = None) -> int:
    """Train a grid; returns the exit code: 2 for bad input, 1 if a row failed, 130 if it was interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG | section.field=value")
    parser.add_argument("--runs", type=Path, required=True, help="where the run directories go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--jobs", type=int, default=1, help="rows that are trained at the same time")
    parser.add_argument("--launch", default="deepspeed --module megatron_tied.pretrain", help="what starts a training")
    arguments = parser.parse_args(argv)
    overrides = [word for word in arguments.configs if "=" in word]
    configs = [Path(word) for word in arguments.configs if "=" not in word]
    try:
        rows = rows_of(configs, arguments.runs, arguments.seeds, overrides)
    except ConfigError as error:
        report(error, sys.stderr)
        return BAD_INPUT
    grid = Grid(rows, shlex.split(arguments.launch), arguments.jobs)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, grid.stop)
    return grid.train()


if __name__ == "__main__":
    sys.exit(main())
