"""Starts the ranks of a benchmark on this host, and brings back what they found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_tied.bench.job import Job
from megatron_tied.bench.messages import read_line, result_of
from megatron_tied.bench.progress import Done, Progress
from megatron_tied.bench.results import Result
from megatron_tied.errors import ConfigError
from megatron_tied.training.launcher import free_port

_LAST_LINES = 30
# Where torchrun begins to tell that a rank has failed, which that rank has told itself.
_TORCHRUN_TELLS = "torch/distributed/elastic/"
_PATIENCE_SECONDS = 10
_ROOT = Path(__file__).parents[2]


class RanksFailedError(RuntimeError):
    """The ranks ended without a result; `lines` are the last that they printed."""

    def __init__(self, code: int, lines: list[str]):
        super().__init__(f"the ranks ended without a result, with exit code {code}")
        self.lines = lines


def run_on_ranks(job: Job, progress: Progress) -> Result:
    """What all contenders of `job` give on its ranks, which are started and ended here.

    Raises `ConfigError` for what only the ranks could find, and `RanksFailedError`.
    """
    result: Result = _found(job, progress)
    return result


def peak_on_ranks(job: Job, contender: str) -> int | None:
    """The peak memory of `contender` on new ranks; None where it cannot be told. Raises as `run_on_ranks`."""
    peak: int | None = _found(replace(job, alone=contender), lambda done: None)
    return peak


def with_peaks_on_cpu(result: Result, job: Job, progress: Progress) -> None:
    """Fill in the peak memory of every contender in `result`: each alone on new ranks, since a CPU allocator keeps no
    peak. Ranks that fail at it cost nothing else: `peak_memory` stays None."""
    rows = result["contenders"]
    for number, (name, row) in enumerate(rows.items()):
        progress(Done(f"measuring the memory of {name}", number, len(rows)))
        with suppress(RanksFailedError):
            row["peak_memory"] = peak_on_ranks(job, name)


def _found(job: Job, progress: Progress) -> Any:
    """What the first rank has written of `job`, as JSON."""
    with tempfile.TemporaryDirectory(prefix="megatron-tied-bench-") as directory:
        file = Path(directory, "job.json")
        file.write_text(job.encode(), encoding="utf-8")
        # Not --standalone, whose agent listens on every interface and unpickles what it is told there.
        where = ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
        command = [sys.executable, "-m", "torch.distributed.run", *where, f"--nproc-per-node={job.ranks}"]
        command += ["--module", "megatron_tied.bench", str(file)]
        ranks = subprocess.Popen(
            command,
            env=_environment(job.ranks),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        try:
            lines = _listen(ranks, progress)
            if not result_of(file).exists():
                raise RanksFailedError(ranks.returncode, lines)
            return json.loads(result_of(file).read_text(encoding="utf-8"))
        finally:
            if ranks.poll() is None:
                # torchrun ends its ranks when it is asked to end.
                ranks.terminate()
                try:
                    ranks.wait(_PATIENCE_SECONDS)
                except subprocess.TimeoutExpired:
                    ranks.kill()


def _listen(ranks: subprocess.Popen[str], progress: Progress) -> list[str]:
    """Until they end; returns the last lines that they printed for people. Raises `ConfigError` for what they found."""
    others: deque[str] = deque(maxlen=_LAST_LINES)
    problems = None
    ended = False
    for line in ranks.stdout or ():
        ended = ended or _TORCHRUN_TELLS in line
        match read_line(line):
            case Done() as done:
                progress(done)
            case list() as found:
                problems = found
            case None if not ended:
                others.append(line.rstrip("\n"))
    ranks.wait()
    if problems is not None:
        raise ConfigError(problems)
    return list(others)


def _environment(ranks: int) -> dict[str, str]:
    environment = dict(os.environ)
    # torchrun would give each of several ranks one thread.
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    # The ranks run the sources that this process runs, installed or not.
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_ROOT), environment.get("PYTHONPATH"))))
    return environment
