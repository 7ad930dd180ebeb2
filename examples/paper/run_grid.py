"""Trains the rows of a grid: every config given, once for every seed, each in a run directory of its own.

    python examples/paper/run_grid.py examples/paper/configs/main/olmoe-tiny-*.yaml [section.field=value ...] \\
        --runs runs/paper [--seeds 1 2 3] [--jobs N] [--launch COMMAND]

What is finished is skipped, and what was interrupted goes on after its last checkpoint: after a crash or Ctrl-C type
the same again. A row that fails is told with its log, and the others are trained all the same. Each is started by
`megatron-tied supervise`, which passes signals on to its ranks and ends what an earlier start has left. In COMMAND,
{port} is a free port, and {job} the number from 0 of the job among N: --launch 'deepspeed --include localhost:{job}
--master_port {port} --module megatron_tied.pretrain' gives each job a GPU.
"""

from __future__ import annotations

import argparse
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from megatron_tied.bad_input import BAD_INPUT, tell
from megatron_tied.errors import ConfigError, Problem
from megatron_tied.run_directory import CONFIG, SUMMARY, last_logged
from megatron_tied.training.config import RunConfig
from megatron_tied.training.config_file import load_config
from megatron_tied.training.launcher import free_port

SUPERVISE = [sys.executable, "-m", "megatron_tied.cli.main", "supervise", "--restarts", "0", "--"]
POLL_SECONDS = 1.0
INTERRUPTED = 130


@dataclass(frozen=True)
class GridRow:
    """One training: of `config`, which is in the file `path` with `overrides`, and says where it goes."""

    name: str
    path: Path
    overrides: Sequence[str]
    config: RunConfig

    @classmethod
    def of(cls, path: Path, overrides: Sequence[str], runs: Path, seed: int) -> GridRow:
        """The config in `path` with this seed. Raises ConfigError."""
        name = f"{path.stem}-seed{seed}"
        given = [*overrides, f"train.seed={seed}", f"train.run_dir={runs / name}"]
        return cls(name, path, given, load_config(path, given))

    @property
    def run_dir(self) -> Path:
        """Where it goes."""
        return Path(self.config.train.run_dir)

    @property
    def is_finished(self) -> bool:
        """Whether its last step is done."""
        return (self.run_dir / SUMMARY).exists()

    @property
    def log(self) -> Path:
        """What it printed, beside its run directory."""
        return self.run_dir.with_name(f"{self.name}.log")

    def figures(self) -> tuple[int, float | None]:
        """The last step that was logged, and its loss."""
        metrics = last_logged(self.run_dir, "loss")
        return metrics.get("step", 0), metrics.get("loss")


def rows_of(configs: Sequence[Path], runs: Path, seeds: Sequence[int], overrides: Sequence[str]) -> list[GridRow]:
    """All rows, those of the first seed first.

    Raises ConfigError for unreadable configs, for names used twice, and for a finished row that was trained otherwise.
    """
    rows = [GridRow.of(path, overrides, runs, seed) for seed in seeds for path in configs]
    names = [row.name for row in rows]
    problems = [
        Problem("CONFIG", name, "must be there once: a run directory has the name of its config, and its seed")
        for name in sorted({name for name in names if names.count(name) > 1})
    ]
    if not rows:
        problems.append(Problem("CONFIG", None, "must be given"))
    problems += [problem for row in rows if row.is_finished for problem in _trained_otherwise(row)]
    if problems:
        raise ConfigError(problems)
    return rows


def _trained_otherwise(row: GridRow) -> Iterator[Problem]:
    """Values of a finished row that are not those asked for now; what is left open was filled in by the run."""
    asked, trained = (_flat(config) for config in (row.config, load_config(row.run_dir / CONFIG)))
    for key, value in asked.items():
        if value is not None and trained.get(key) != value:
            valid = f"must be {trained.get(key)!r}, with which {row.run_dir} was trained; or give another --runs"
            yield Problem(key, value, valid)


def _flat(config: RunConfig) -> dict[str, Any]:
    sections = config.model_dump(mode="json")
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}


class Grid:
    """Trains rows, `jobs` at a time, by `launch`, and shows how far all of them are."""

    def __init__(self, rows: Sequence[GridRow], launch: Sequence[str], jobs: int):
        self._rows, self._launch, self._jobs = rows, launch, jobs
        self._free_jobs: queue.Queue[int] = queue.Queue()
        for job in range(jobs):
            self._free_jobs.put(job)
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
        task = self._progress.add_task(
            row.name, total=row.config.train.steps, completed=row.figures()[0], note="starting"
        )
        job = self._free_jobs.get()
        try:
            row.run_dir.parent.mkdir(parents=True, exist_ok=True)
            with row.log.open("ab") as log:
                # Trainings on one host cannot share the launcher's usual port.
                launch = [word.format(port=free_port(), job=job) for word in self._launch]
                command = [*SUPERVISE, *launch, "--config", str(row.path), *row.overrides]
                # A session of its own: Ctrl-C goes by way of this process.
                process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
                self._watch(row, process, task)
        except OSError as error:
            self._fail(row, str(error))
        else:
            if row.is_finished:
                self._progress.console.print(f"{row.name}: finished, {_loss(row.figures()[1])}")
            elif not self._stopping.is_set():
                self._fail(row, f"exit code {process.returncode}, see {row.log}")
        self._free_jobs.put(job)
        self._progress.remove_task(task)
        self._progress.update(every, completed=sum(row.is_finished for row in self._rows))

    def _watch(self, row: GridRow, process: subprocess.Popen[bytes], task: TaskID) -> None:
        told = False
        while process.poll() is None:
            if self._stopping.is_set() and not told:
                process.send_signal(signal.SIGTERM)  # it saves, and ends
                told = True
            step, loss = row.figures()
            self._progress.update(task, completed=step, note="saving" if told else _loss(loss))
            time.sleep(POLL_SECONDS)

    def _fail(self, row: GridRow, why: str) -> None:
        self._failed.append(row.name)
        self._progress.console.print(f"{row.name}: failed: {why}")


def _loss(value: float | None) -> str:
    return "" if value is None else f"loss {value:.4f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Train a grid; returns the exit code: 2 for bad input, 1 if a row failed, 130 if it was interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG | section.field=value")
    parser.add_argument("--runs", type=Path, required=True, help="where the run directories go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--jobs", type=int, default=1, help="rows that are trained at the same time")
    parser.add_argument(
        "--launch",
        default="deepspeed --master_port {port} --module megatron_tied.pretrain",
        help="what starts a training (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    overrides = [word for word in arguments.configs if "=" in word]
    configs = [Path(word) for word in arguments.configs if "=" not in word]
    try:
        if arguments.jobs < 1:
            raise ConfigError(Problem("--jobs", arguments.jobs, "must be at least 1"))
        rows = rows_of(configs, arguments.runs, arguments.seeds, overrides)
    except ConfigError as error:
        tell(error, sys.stderr)
        return BAD_INPUT
    grid = Grid(rows, shlex.split(arguments.launch), arguments.jobs)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, grid.stop)
    return grid.train()


if __name__ == "__main__":
    sys.exit(main())
