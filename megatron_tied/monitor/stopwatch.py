"""Time that passes on the device, read without waiting for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the time between entering and leaving `running`: CUDA events where there is a GPU, else the host's."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def running(self) -> Iterator[None]:
        """What the host does in this context is timed, or, with a GPU, what it queues on the current stream."""
        if not torch.cuda.is_available():
            then = time.perf_counter()
            try:
                yield
            finally:
                self._seconds += time.perf_counter() - then
            return
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        try:
            yield
        finally:
            ended.record()
            self._events.append((began, ended))
            self._add_finished()

    def take(self) -> float:
        """Seconds since the last call; waits for the device."""
        while self._events:
            self._events[-1][1].synchronize()
            self._add_finished()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _add_finished(self) -> None:
        # Not all at the end: between two log lines there may be very many.
        while self._events and self._events[0][1].query():
            began, ended = self._events.popleft()
            self._seconds += began.elapsed_time(ended) / 1000
