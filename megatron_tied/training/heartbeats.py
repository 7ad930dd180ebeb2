"""The connections that heartbeats go over: lines of JSON, small, checked, and never waited for."""

from __future__ import annotations

import hmac
import json
import os
import socket
from typing import NamedTuple

from megatron_tied.platform.rendezvous import is_known_elsewhere

Message = dict[str, str | int]

_MAX_BYTES = 4096  # of a message
_READ_BYTES = 1 << 16


class ConnectionLostError(Exception):
    """The other side is gone, or is not what it should be; the message says how that showed."""


class Connection:
    """One TCP connection to another rank; every call returns at once."""

    def __init__(self, sock: socket.socket):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = sock
        self._unsent = b""
        self._unread = b""

    def send(self, message: Message) -> None:
        """Send `message`; a heartbeat that the network has no room for is dropped, the next one says the same."""
        if not self._unsent:
            self._unsent = json.dumps(message).encode() + b"\n"
        try:
            self._unsent = self._unsent[self.socket.send(self._unsent) :]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            # What the other side has said before its end may still be unread: `receive` tells of the end.
            self._unsent = b""

    def receive(self) -> list[Message]:
        """The messages that have come whole. Raises `ConnectionLostError`, but not before all have been returned."""
        closed = None
        while closed is None and len(self._unread) <= _MAX_BYTES:
            try:
                received = self.socket.recv(_READ_BYTES)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                closed = error.strerror
            else:
                self._unread += received
                closed = None if received else "connection closed by the other side"
        *lines, self._unread = self._unread.split(b"\n")
        if not lines and closed:
            raise ConnectionLostError(closed)
        if len(self._unread) > _MAX_BYTES:
            raise ConnectionLostError("it sends what is no heartbeat")
        return [_parsed(line) for line in lines]

    def close(self) -> None:
        """Close it; the other side is told by the operating system."""
        self.socket.close()


class Place(NamedTuple):
    """Where the first rank waits for the others, and the word that they say."""

    address: str
    port: int
    secret: str


def listen(ranks: int) -> tuple[socket.socket, str]:
    """A listening socket of the first rank, and the address by which the other ranks reach it.

    On the address of MASTER_ADDR, or where that is a name for another one (a service in Kubernetes), on the one from
    which this host reaches it. Raises `OSError`.
    """
    master = os.environ["MASTER_ADDR"]
    family, *_, target = socket.getaddrinfo(master, int(os.environ["MASTER_PORT"]), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # sends nothing
        address = probe.getsockname()[0]
    if is_known_elsewhere(master):
        return socket.create_server(("", 0), family=family, backlog=ranks), master
    return socket.create_server((address, 0), family=family, backlog=ranks), address


def connect(place: Place, rank: int, patience: float) -> Connection:
    """The connection of `rank` to the first one. Raises `OSError` when there is none after `patience` seconds."""
    connection = Connection(socket.create_connection(place[:2], timeout=patience))
    connection.send({"secret": place.secret, "rank": rank})
    return connection


class Newcomer:
    """A connection of which nobody knows yet who is at the other end; it is to be told `until` then."""

    def __init__(self, connection: Connection, until: float):
        self.connection, self.until = connection, until
        self.further: list[Message] = []

    def rank(self, secret: str, ranks: int) -> int | None:
        """Which rank it is, by its first message; None while that has not come. Raises `ConnectionLostError`.

        What came with that message is in `further`.
        """
        messages = self.connection.receive()
        if not messages:
            return None
        first, *self.further = messages
        said, rank = first.get("secret"), first.get("rank")
        if not isinstance(said, str) or not hmac.compare_digest(said.encode(errors="replace"), secret.encode()):
            raise ConnectionLostError("it does not know the secret")
        if not isinstance(rank, int) or not 0 < rank < ranks:
            raise ConnectionLostError("it is no rank of this run")
        return rank


def _parsed(line: bytes) -> Message:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict) or not all(type(value) in (str, int) for value in message.values()):
        raise ConnectionLostError("it sends what is no heartbeat")
    return message
