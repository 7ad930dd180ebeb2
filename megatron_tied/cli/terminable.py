"""SIGTERM as an exception, so that what a command has begun, or started, is ended."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(BaseException):
    """SIGTERM has come. Like KeyboardInterrupt no `Exception`, which somebody might handle."""


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated` while the context lasts."""

    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a fork, whom the signal is to end
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        # Schedulers signal more than once: the next must not end the removing.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
