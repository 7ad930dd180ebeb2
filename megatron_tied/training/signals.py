"""A polite end: SIGTERM, or SIGUSR1, which SLURM sends before the time limit, on whichever rank it arrives."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

import torch

Handler = Callable[[int, FrameType | None], object] | int | None  # what `signal.signal` takes and returns

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Notes these signals instead of dying of them: SIGUSR1 while entered, SIGTERM too from `tell_all` on.

    A run that is being set up, and is told to end, has nothing to save; SIGUSR1 asks for a save.
    """

    def __init__(self) -> None:
        self._group: torch.distributed.ProcessGroup | None = None
        self._noted = 0
        self._before: dict[int, Handler] = {}

    def tell_all(self, group: torch.distributed.ProcessGroup) -> None:
        """From now on `received` can be asked; `group` is a process group for host memory (gloo)."""
        self._group = group
        self._note_from_now_on(signal.SIGTERM)

    def received(self) -> str | None:
        """The name of a signal that some rank has received, the same on every rank; a collective."""
        noted = torch.tensor([self._noted])
        torch.distributed.all_reduce(noted, op=torch.distributed.ReduceOp.MAX, group=self._group)
        number = int(noted.item())
        if not number:
            return None
        # Schedulers signal more than once, and launchers pass it on late: it must not kill a run that saves and ends.
        self._before = dict.fromkeys(_SIGNALS, signal.SIG_IGN)
        self._restore()
        return signal.Signals(number).name

    def _note_from_now_on(self, number: signal.Signals) -> None:
        self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = number

    def __enter__(self) -> Self:
        self._note_from_now_on(signal.SIGUSR1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
