"""Time that passes on the device, read without waiting for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the time between entering and leaving `running`: CUDA events where there is a GPU, else the host's."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """What the host does, and queues on the current stream, in this context is timed."""
        if not torch.cuda.is_available():
            began = time.perf_counter()
            try:
                yield
            finally:
                self._seconds += time.perf_counter() - began
            return
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        try:
            yield
        finally:
            ended.record()
            self._events.append((began, ended))

    def take(self) -> float:
        """Seconds since the last call; waits for the device."""
        for began, ended in self._events:
            ended.synchronize()
            self._seconds += began.elapsed_time(ended) / 1000
        seconds, self._seconds, self._events = self._seconds, 0.0, []
        return seconds
