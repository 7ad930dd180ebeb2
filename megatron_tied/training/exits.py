"""How the process of a rank ends when Python's own way of ending would wait for what never comes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from typing import NoReturn

LOST = 75  # the exit code of every rank when one is lost: sysexits' EX_TEMPFAIL, "try again"


def end_workers() -> None:
    """Kill the processes that load data for this one: they outlive SIGTERM, and Python waits for them at its exit."""
    for worker in multiprocessing.active_children():
        worker.kill()


def end_process(code: int) -> NoReturn:
    """End this process at once, whatever its threads are doing."""
    end_workers()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
