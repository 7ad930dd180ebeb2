"""The processes of one supervised run on this host: to count, to signal, to end. `python -m` it on other hosts.

A run is known by a token, which stands in the command line of everything that its launcher starts on any host,
and in the environment of what those start. It comes on standard input: so nothing that only looks for it holds it.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import psutil

from megatron_tied.training.launcher import TOKEN_VARIABLE

_PATIENCE_SECONDS = 10.0


class Request(NamedTuple):
    """`signal` sends `number` to the ranks, `end` ends every process of the run, `count` does nothing."""

    token: str
    action: Literal["count", "signal", "end"]
    number: int = 0


class Found(NamedTuple):
    """How many ranks of the run were there, and how many of all its processes could not be ended."""

    ranks: int
    left: int


def sweep(request: Request) -> Found:
    """Look for the run's processes on this host, and do what is asked."""
    ranks = _ranks(request.token)
    left: list[psutil.Process] = []
    if request.action == "signal":
        for rank in ranks:
            _try(partial(rank.send_signal, request.number))
    if request.action == "end":
        deadline, left = time.monotonic() + _PATIENCE_SECONDS, _processes(request.token)
        while left and time.monotonic() < deadline:
            for process in left:
                _try(process.kill)
            psutil.wait_procs(left, timeout=0.2)
            # What was started meanwhile, too.
            left = _processes(request.token)
    return Found(len(ranks), len(left))


def _processes(token: str) -> list[psutil.Process]:
    """Launchers, ranks, what loads data for them, and what any of these has started."""
    marked = [process for process in psutil.process_iter() if _is_marked(process, token)]
    found = {process.pid: process for process in marked}
    for process in marked:
        found |= {child.pid: child for child in _children(process) if child.is_running() and not _is_zombie(child)}
    return list(found.values())


def _is_marked(process: psutil.Process, token: str) -> bool:
    try:
        if _is_zombie(process):
            return False
        # In a shell's command line the token is a part of a word.
        return any(token in word for word in process.cmdline()) or process.environ().get(TOKEN_VARIABLE) == token
    except (psutil.Error, OSError):  # it has ended, or is another user's
        return False


def _ranks(token: str) -> list[psutil.Process]:
    """The processes that train: what they fork to load data has their command line."""
    found = {}
    for process in psutil.process_iter():
        try:
            if token in process.cmdline() and "RANK" in process.environ():
                found[process.pid] = process
        except (psutil.Error, OSError):
            continue
    return [process for process in found.values() if _parent(process) not in found]


def _parent(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.Error:
        return None


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except (psutil.Error, OSError):
        return []


def _is_zombie(process: psutil.Process) -> bool:
    """Whether it has ended, also where its parent has not taken notice."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True


def _try(act: Callable[[], object]) -> None:
    try:
        act()
    except (psutil.Error, OSError):
        return


def main() -> int:
    """Read a request, as JSON, and write what was found."""
    # The end of the connection that it came over must not end it halfway.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    print(json.dumps(sweep(Request(*json.load(sys.stdin)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
