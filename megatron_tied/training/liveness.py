"""Whether all ranks live: when one is lost, every rank ends, soon and with one message.

Collectives alone do not notice it: a rank that is stopped, or whose host or link is gone, keeps the others waiting for
half an hour or for good. So a thread of every rank exchanges heartbeats with the first rank.
"""

from __future__ import annotations

import contextlib
import secrets
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import torch

from megatron_tied.errors import ConfigError, Problem, TrainingStopped
from megatron_tied.exchange import gather_json
from megatron_tied.training.heartbeat_thread import CONNECT_SECONDS, HeartbeatThread
from megatron_tied.training.heartbeats import Place, connect, listen
from megatron_tied.training.lost_ranks import Loss, last_line, tell
from megatron_tied.training.signals import Handler

# What ends a run on all ranks alike, or is told by the one who pressed Ctrl-C.
_POLITE = (ConfigError, TrainingStopped, KeyboardInterrupt, SystemExit)


class Liveness:
    """While entered, ends this process when another rank is lost or has failed, and all of them when this one fails.

    `timeout` in seconds of silence; 0: without heartbeats. Entering is a collective; raises `ConfigError` on every
    rank where the first one cannot be reached.
    """

    def __init__(self, timeout: float, run_dir: Path):
        self._timeout = timeout
        self._run_dir = run_dir
        self._step = 0
        self._thread: HeartbeatThread | None = None
        self._before: Handler = signal.SIG_DFL

    def step_done(self, step: int) -> None:
        """Note `step` as the last one that this rank has done."""
        self._step = step
        if self._thread is not None:
            self._thread.step_done(step)

    @contextlib.contextmanager
    def patience(self) -> Iterator[None]:
        """While entered, by all ranks at once, silence counts late: what holds Python's lock for long sends nothing."""
        if self._thread is None:
            yield
            return
        self._thread.be_patient(True)
        try:
            yield
        finally:
            self._thread.be_patient(False)

    def __enter__(self) -> Self:
        if self._timeout and torch.distributed.get_world_size() > 1:
            self._thread = _start_thread(self._timeout, self._run_dir)
            self._before = signal.signal(signal.SIGTERM, self._terminate)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        thread = self._thread
        failure = None if isinstance(error, _POLITE) else error
        if thread is not None and failure is not None:
            thread.fail(failure)
        elif thread is not None:
            if signal.getsignal(signal.SIGTERM) == self._terminate:
                signal.signal(signal.SIGTERM, self._before)
            thread.leave()
        elif failure is not None:
            told = {torch.distributed.get_rank(): Loss("failed", last_line(failure), self._step)}
            is_alone = torch.distributed.get_world_size() == 1
            tell(told, dict.fromkeys(told, socket.gethostname()), self._run_dir, ends_all=is_alone)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        """A launcher ends its other ranks within a second of one's death: what has happened is to be told first."""
        if self._thread is None or not self._thread.is_ending:
            signal.signal(number, self._before)
            signal.raise_signal(number)


def _start_thread(timeout: float, run_dir: Path) -> HeartbeatThread:
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    listener, place, connection, failure = None, None, None, None
    if rank == 0:
        try:
            listener, address = listen(ranks)
            place = Place(address, listener.getsockname()[1], secrets.token_hex(16))
        except OSError as error:
            failure = f"rank 0 on {socket.gethostname()} cannot listen on the address of MASTER_ADDR: {error}"
    hosts = gather_json(socket.gethostname())
    of_first = gather_json(place)[0]
    if rank and of_first is not None:
        place = Place(*of_first)
        try:
            connection = connect(place, rank, CONNECT_SECONDS)
        except OSError as error:
            failure = f"rank {rank} on {hosts[rank]} cannot reach {place.address}, port {place.port}: {error}"
    if failures := [failure for failure in gather_json(failure) if failure]:
        valid = f"needs a TCP port of the first rank's host that all ranks reach, or 0 to do without; {failures[0]}"
        raise ConfigError(Problem("train.liveness_timeout", timeout, valid))
    thread = HeartbeatThread(rank, hosts, timeout, run_dir)
    if listener is not None and place is not None:
        thread.listen_to(range(1, ranks), listener, place.secret)
    if connection is not None:
        thread.listen_on(0, connection)
    thread.start()
    return thread
