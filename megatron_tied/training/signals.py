"""A polite end: SIGTERM, or SIGUSR1, which SLURM sends before the time limit, on whichever rank it arrives."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Self

import torch

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """While entered, notes these signals instead of dying of them; `received` tells all ranks alike.

    `group` is a process group for host memory (gloo).
    """

    def __init__(self, group: torch.distributed.ProcessGroup):
        self._group = group
        self._noted = 0
        self._before: dict[int, object] = {}

    def received(self) -> str | None:
        """The name of a signal that some rank has received, the same on every rank; a collective."""
        noted = torch.tensor([self._noted])
        torch.distributed.all_reduce(noted, op=torch.distributed.ReduceOp.MAX, group=self._group)
        return signal.Signals(noted.item()).name if noted.item() else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = number

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
