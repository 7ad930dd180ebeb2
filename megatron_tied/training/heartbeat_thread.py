"""The thread by which a rank knows that the others live, and ends its process when one does not."""

from __future__ import annotations

import contextlib
import multiprocessing.util
import selectors
import socket
import threading
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_tied.training.exits import LOST, end_process
from megatron_tied.training.heartbeats import Connection, ConnectionLostError, Message, Newcomer
from megatron_tied.training.lost_ranks import Loss, causes, last_line, tell

CONNECT_SECONDS = 10.0  # in which a rank has reached the first one, and has said who it is

_BEATS_PER_TIMEOUT = 10
_STRANGERS = 16  # beside the ranks, who may connect before they have said who they are
_LONGEST_INTERVAL = 1.0  # seconds
_PATIENCE = 20  # timeouts
_FAREWELL_SECONDS = 1.0  # in which those who are told to end do so
_LAST_WORDS_SECONDS = 5.0  # in which a message is written, or never: file systems and terminals may hang too


@dataclass
class _Member:
    """Another rank, as this one knows it."""

    connection: Connection | None = None
    heard: float = field(default_factory=time.monotonic)
    step: int = 0
    has_left: bool = False


class HeartbeatThread(threading.Thread):
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
        multiprocessing.util.register_after_fork(self, HeartbeatThread._close_all)

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
        if len(self._newcomers) > len(self._hosts) + _STRANGERS:
            accepted.close()
            return
        newcomer = Newcomer(Connection(accepted), time.monotonic() + CONNECT_SECONDS)
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


def _end_after(seconds: float) -> None:
    timer = threading.Timer(seconds, end_process, (LOST,))
    timer.daemon = True
    timer.start()
