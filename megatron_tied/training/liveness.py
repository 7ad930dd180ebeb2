"""Whether all ranks live: when one is lost, every rank ends, soon and with one message.

Collectives alone do not notice it: a rank that is stopped, or whose host or link is gone, keeps the others waiting for
half an hour or for good. So a thread of every rank exchanges heartbeats with the first rank.
"""

from __future__ import annotations

import contextlib
import multiprocessing.util
import secrets
import selectors
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import torch

from megatron_tied.errors import ConfigError, Problem, TrainingStopped
from megatron_tied.exchange import gather_json
from megatron_tied.training.exits import LOST, end_process
from megatron_tied.training.heartbeats import (
    Connection,
    ConnectionLostError,
    Message,
    Newcomer,
    Place,
    connect,
    listen,
)
from megatron_tied.training.lost_ranks import Loss, causes, last_line, tell

# What ends a run on all ranks alike, or is told by the one who pressed Ctrl-C.
_POLITE = (ConfigError, TrainingStopped, KeyboardInterrupt, SystemExit)
_Handler = Callable[[int, FrameType | None], object] | int | None
_BEATS_PER_TIMEOUT = 10
_LONGEST_INTERVAL = 1.0  # seconds
_CONNECT_SECONDS = 10.0
_PATIENCE = 20  # timeouts
_FAREWELL_SECONDS = 1.0  # in which those who are told to end do so
_LAST_WORDS_SECONDS = 5.0  # in which a message is written, or never: file systems and terminals may hang too


class Liveness:
    """While entered, ends this process when another rank is lost or has failed, and all of them when this one fails.

    `timeout` in seconds of silence; 0: without heartbeats. Entering is a collective; raises `ConfigError` on every
    rank where the first one cannot be reached.
    """

    def __init__(self, timeout: float, run_dir: Path):
        self._timeout = timeout
        self._run_dir = run_dir
        self._step = 0
        self._watch: _Watch | None = None
        self._before: _Handler = signal.SIG_DFL

    def step_done(self, step: int) -> None:
        """Note `step` as the last one that this rank has done."""
        self._step = step
        if self._watch is not None:
            self._watch.step_done(step)

    @contextlib.contextmanager
    def patience(self) -> Iterator[None]:
        """While entered, by all ranks at once, silence counts late: what holds Python's lock for long sends nothing."""
        if self._watch is None:
            yield
            return
        self._watch.be_patient(True)
        try:
            yield
        finally:
            self._watch.be_patient(False)

    def __enter__(self) -> Self:
        if self._timeout and torch.distributed.get_world_size() > 1:
            self._watch = _start_watch(self._timeout, self._run_dir)
            self._before = signal.signal(signal.SIGTERM, self._terminate)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        watch = self._watch
        is_failure = error is not None and not isinstance(error, _POLITE)
        if watch is not None and is_failure:
            watch.fail(error)
        elif watch is not None:
            if signal.getsignal(signal.SIGTERM) == self._terminate:
                signal.signal(signal.SIGTERM, self._before)
            watch.leave()
        elif is_failure:
            told = {torch.distributed.get_rank(): Loss("failed", last_line(error), self._step)}
            is_alone = torch.distributed.get_world_size() == 1
            tell(told, dict.fromkeys(told, socket.gethostname()), self._run_dir, ends_all=is_alone)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        """A launcher ends its other ranks within a second of one's death: what has happened is to be told first."""
        if self._watch is None or not self._watch.is_ending:
            signal.signal(number, self._before)
            signal.raise_signal(number)


@dataclass
class _Member:
    """Another rank, as this one knows it."""

    connection: Connection | None = None
    heard: float = field(default_factory=time.monotonic)
    step: int = 0
    has_left: bool = False


class _Watch(threading.Thread):
    """The thread of one rank: the first listens to all others, they listen to the first."""

    def __init__(self, rank: int, hosts: Sequence[str], timeout: float, run_dir: Path):
        super().__init__(name="liveness", daemon=True)
        self._rank, self._hosts, self._timeout, self._run_dir = rank, hosts, timeout, run_dir
        self._interval = min(_LONGEST_INTERVAL, timeout / _BEATS_PER_TIMEOUT)
        self._others: dict[int, _Member] = {}
        self._newcomers: list[Newcomer] = []
        self._losses: dict[int, Loss] = {}
        self._decide_at = float("inf")
        self._step = 0
        self._failure: BaseException | None = None
        self._failure_is_told = False
        self._is_leaving = False
        self._is_patient = False
        self._selector = selectors.DefaultSelector()
        self._wake, woken = socket.socketpair()
        for sock in (self._wake, woken):
            sock.setblocking(False)
        self._sockets = [self._wake, woken]
        self._selector.register(woken, selectors.EVENT_READ, lambda: self._woken(woken))
        # A copy in a process that loads data would keep connections open when this one is killed.
        multiprocessing.util.register_after_fork(self, _Watch._close_all)

    # ---- called by the main thread

    def listen_to(self, ranks: Sequence[int], listener: socket.socket, secret: str) -> None:
        """Wait for `ranks`, which connect to `listener` and know the secret."""
        self._others = {rank: _Member() for rank in ranks}
        listener.setblocking(False)
        self._register(listener, lambda: self._accept(listener, secret))

    def listen_on(self, rank: int, connection: Connection) -> None:
        """Listen to `rank`, at the other end of `connection`."""
        self._others[rank] = _Member()
        self._attach(rank, connection)

    def step_done(self, step: int) -> None:
        """Tell the others, with the next heartbeat: a message a step of every rank would be too many for the first."""
        self._step = step

    def be_patient(self, is_patient: bool) -> None:
        """Whether others may be silent for long."""
        self._is_patient = is_patient
        for member in self._others.values():
            member.heard = time.monotonic()

    def fail(self, error: BaseException) -> None:
        """Tell of this rank's failure, as one or as what followed from another's; never returns."""
        self._failure = error
        self._wake_up()
        self.join()

    def leave(self) -> None:
        """Take leave of the others."""
        self._is_leaving = True
        self._wake_up()
        self.join()

    def _wake_up(self) -> None:
        # It has been told often enough, or has seen why by itself and is gone.
        with contextlib.suppress(OSError):
            self._wake.send(b"\0")

    @property
    def is_ending(self) -> bool:
        """Whether this process is about to end, a rank being lost or this one having failed."""
        return bool(self._losses) or self._failure is not None

    # ---- the thread

    def run(self) -> None:
        """Exchange heartbeats until this rank leaves, or one is lost."""
        before = due = time.monotonic()
        while not self._is_leaving:
            for key, _ in self._selector.select(max(0.0, due - time.monotonic())):
                key.data()
            now = time.monotonic()
            if now < due:
                continue
            due = now + self._interval
            if now - before > self._timeout / 2:
                # It was this process that was stopped: what the others have sent meanwhile is yet to be read.
                for member in self._others.values():
                    member.heard = now
            before = now
            self._beat()
            self._judge(now)
            for newcomer in [each for each in self._newcomers if each.until < now]:
                self._turn_away(newcomer)
        for member in self._others.values():
            if member.connection is not None:
                member.connection.send({"leaves": 1})
        self._close_all()

    def _woken(self, woken: socket.socket) -> None:
        woken.recv(1024)
        if self._failure is not None and not self._failure_is_told:
            self._failure_is_told = True
            if self._rank == 0 or self._others[0].has_left:
                self._suspect(self._rank, Loss("failed", last_line(self._failure), self._step))
            else:
                self._send(0, {"failed": last_line(self._failure), "step": self._step})

    def _accept(self, listener: socket.socket, secret: str) -> None:
        try:
            accepted, _ = listener.accept()
        except OSError:  # gone again
            return
        newcomer = Newcomer(Connection(accepted), time.monotonic() + _CONNECT_SECONDS)
        self._newcomers.append(newcomer)
        self._register(accepted, lambda: self._welcome(newcomer, secret))

    def _welcome(self, newcomer: Newcomer, secret: str) -> None:
        try:
            rank = newcomer.rank(secret, len(self._hosts))
        except ConnectionLostError:  # of a stranger
            self._turn_away(newcomer)
            return
        if rank is None:
            return
        self._newcomers.remove(newcomer)
        self._selector.unregister(newcomer.connection.socket)
        self._sockets.remove(newcomer.connection.socket)
        self._attach(rank, newcomer.connection)
        self._hear(rank, newcomer.further)

    def _turn_away(self, newcomer: Newcomer) -> None:
        self._newcomers.remove(newcomer)
        self._forget(newcomer.connection)

    def _attach(self, rank: int, connection: Connection) -> None:
        member = self._others[rank]
        member.connection, member.heard = connection, time.monotonic()
        self._register(connection.socket, lambda: self._receive(rank, connection))

    def _receive(self, rank: int, connection: Connection) -> None:
        try:
            self._hear(rank, connection.receive())
        except ConnectionLostError as error:
            self._forget(connection)
            member = self._others[rank]
            member.connection = None
            if not member.has_left:
                self._suspect(rank, Loss("closed", f"its process has died ({error})", member.step))

    def _hear(self, rank: int, messages: Sequence[Message]) -> None:
        member = self._others[rank]
        for message in messages:
            member.heard = time.monotonic()
            if isinstance(step := message.get("step"), int):
                member.step = step
            if "leaves" in message:
                member.has_left = True
                if self._failure is not None:
                    self._suspect(self._rank, Loss("failed", last_line(self._failure), self._step))
            if "failed" in message:
                self._suspect(rank, Loss("failed", str(message["failed"]), member.step))
            if "end" in message and rank == 0:
                self._obey(str(message["end"]).split(","))

    def _beat(self) -> None:
        for rank in self._others:
            self._send(rank, {"step": self._step})

    def _judge(self, now: float) -> None:
        timeout = self._timeout * (_PATIENCE if self._is_patient else 1)
        for rank, member in self._others.items():
            if not member.has_left and now - member.heard > timeout:
                how = f"nothing was heard of it for {timeout:g} s: it is stopped, or its host or link is down"
                self._suspect(rank, Loss("silent", how, member.step))
        if now >= self._decide_at:
            self._end()

    def _suspect(self, rank: int, loss: Loss) -> None:
        if not self._losses:
            # Others may be lost by the same cause, and some fail because of it.
            self._decide_at = time.monotonic() + 2 * self._interval
        self._losses.setdefault(rank, loss)

    def _end(self) -> None:
        """Tell what has happened, once on all ranks or on every host where the first rank is not there to do it."""
        _end_after(_LAST_WORDS_SECONDS)
        found = causes(self._losses)
        for rank in self._others:
            self._send(rank, {"end": ",".join(map(str, found))})
        if self._rank in found:
            traceback.print_exception(self._failure)
        if self._rank == 0 or self._rank in found or self._is_first_here(found):
            tell(found, self._hosts, self._run_dir, ends_all=True)
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while self._rank == 0 and self._any_connected() and time.monotonic() < deadline:
            for key, _ in self._selector.select(0.1):
                key.data()
        end_process(LOST)

    def _obey(self, found: Sequence[str]) -> None:
        _end_after(_LAST_WORDS_SECONDS)
        if str(self._rank) in found and self._failure is not None:
            traceback.print_exception(self._failure)
        end_process(LOST)

    def _is_first_here(self, lost: Collection[int]) -> bool:
        here = [rank for rank, host in enumerate(self._hosts) if host == self._hosts[self._rank]]
        return self._rank == min(rank for rank in here if rank not in lost)

    def _any_connected(self) -> bool:
        return any(member.connection is not None for rank, member in self._others.items() if rank not in self._losses)

    def _send(self, rank: int, message: Message) -> None:
        if (connection := self._others[rank].connection) is not None:
            connection.send(message)

    def _register(self, sock: socket.socket, handle: Callable[[], None]) -> None:
        self._sockets.append(sock)
        self._selector.register(sock, selectors.EVENT_READ, handle)

    def _forget(self, connection: Connection) -> None:
        self._selector.unregister(connection.socket)
        self._sockets.remove(connection.socket)
        connection.close()

    def _close_all(self) -> None:
        for sock in self._sockets:
            sock.close()
        self._selector.close()


def _start_watch(timeout: float, run_dir: Path) -> _Watch:
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    listener, place, failure = None, None, None
    if rank == 0:
        try:
            listener, address = listen(ranks)
            place = Place(address, listener.getsockname()[1], secrets.token_hex(16))
        except OSError as error:
            failure = f"rank 0 on {socket.gethostname()} cannot listen on the address of MASTER_ADDR: {error}"
    told = gather_json({"host": socket.gethostname(), "place": place})
    hosts, place = [of_rank["host"] for of_rank in told], told[0]["place"] and Place(*told[0]["place"])
    connection = None
    if rank and place:
        try:
            connection = connect(place, rank, _CONNECT_SECONDS)
        except OSError as error:
            failure = f"rank {rank} on {hosts[rank]} cannot reach {place.address}, port {place.port}: {error}"
    if failures := [failure for failure in gather_json(failure) if failure]:
        valid = f"needs a TCP port of the first rank's host that all ranks reach, or 0 to do without; {failures[0]}"
        raise ConfigError(Problem("train.liveness_timeout", timeout, valid))
    watch = _Watch(rank, hosts, timeout, run_dir)
    if listener is not None:
        watch.listen_to(range(1, ranks), listener, place.secret)
    elif connection is not None:
        watch.listen_on(0, connection)
    watch.start()
    return watch


def _end_after(seconds: float) -> None:
    timer = threading.Timer(seconds, end_process, (LOST,))
    timer.daemon = True
    timer.start()
