"""Runs commands that start ranks; when they hang they say where, and none is left."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

_LAST_WORDS_SECONDS = 10


def run_to_end(
    command: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Both streams in `stdout`. What takes longer than `timeout` seconds shows the stack of every process and fails."""
    job = subprocess.Popen(
        command,
        cwd=cwd,
        env={**env, "PYTHONFAULTHANDLER": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        shown, _ = job.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        shown = _ended(job)
        raise AssertionError(f"{command} has not ended in {timeout:g} s:\n{shown[-20_000:]}") from None
    return subprocess.CompletedProcess(command, job.returncode, shown)


def _ended(job: subprocess.Popen[str]) -> str:
    processes = psutil.Process(job.pid).children(recursive=True)
    for number in (signal.SIGABRT, signal.SIGKILL):  # faulthandler's signal first
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        psutil.wait_procs(processes, timeout=_LAST_WORDS_SECONDS)
    job.kill()
    return job.communicate()[0]
