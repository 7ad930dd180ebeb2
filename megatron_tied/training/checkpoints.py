"""When a run saves, and what it says about it."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

import torch

from megatron_tied.checkpoint.saver import Saver
from megatron_tied.errors import TrainingStopped
from megatron_tied.training.config import RunConfig
from megatron_tied.training.resume import checkpoint_directory
from megatron_tied.training.state import RunState


class Checkpoints:
    """The checkpoints of one run. Every rank calls the same methods after the same steps.

    `group` is a process group for host memory (gloo) that nobody else uses. A context manager: on leaving, what is
    being written is finished, but for Ctrl-C.
    """

    def __init__(self, config: RunConfig, state: RunState, group: torch.distributed.ProcessGroup):
        settings = config.checkpoint
        self._config = config
        self._state = state
        self._saver = Saver(
            checkpoint_directory(config),
            group,
            in_background=settings.async_save,
            keep_last=settings.keep_last,
            keep_every=settings.keep_every,
        )
        self._saved = 0
        self._failure: str | None = None

    def after_step(self, step: int, say: Callable[[str], None]) -> None:
        """Save if it is time. A failure is shown, and training goes on: the checkpoints before are untouched."""
        every = self._config.checkpoint.save_every
        if every and (step % every == 0 or step == self._config.train.steps):
            self._save(step)
        self._tell(say)

    def finish(self, step: int, say: Callable[[str], None]) -> None:
        """Make sure that `step`, the last one, is saved. Raises `TrainingStopped` if it could not be."""
        if not self._config.checkpoint.save_every:
            return
        if self._saved != step:
            self._save(step)
        self._saver.wait()
        self._tell(say)
        if self._failure:
            raise TrainingStopped(f"step {step} is not saved: {self._failure}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, Exception):
            self._saver.wait()

    def _tell(self, say: Callable[[str], None]) -> None:
        for outcome in self._saver.outcomes():
            self._failure = outcome.failure
            if outcome.failure is None:
                say(f"step {outcome.step}: saved {outcome.path}")
            else:
                say(f"WARNING: step {outcome.step} is NOT SAVED ({outcome.failure}); older checkpoints are kept")

    def _save(self, step: int) -> None:
        self._saver.save(self._state.tensors(), self._state.manifest(step), self._state.expected())
        self._saved = step
