"""Saving: collective, atomic, and on request in the background while training goes on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch

from megatron_tied.checkpoint.directory import CheckpointDirectory
from megatron_tied.checkpoint.manifest import Manifest
from megatron_tied.checkpoint.rectangles import Rectangles, StateDict
from megatron_tied.checkpoint.storage import completed, write
from megatron_tied.checkpoint.together import RankError, of_every_rank
from megatron_tied.files import sync


@dataclass(frozen=True)
class Outcome:
    """How an attempt to save ended: `failure` is None or one line, with the rank and its reason."""

    step: int
    path: Path
    failure: str | None


class Saver:
    """Writes checkpoints, one at a time, and removes old ones; every rank makes the same calls in the same order.

    `group` is a process group for host memory (gloo) that nobody else uses. In the background a THREAD writes: a
    process would need its copy of the tensors in shared memory, of which containers have 64 MB unless told otherwise.
    What waits is the copy to host memory, and the save before if it is still being written.
    """

    def __init__(
        self,
        directory: CheckpointDirectory,
        group: torch.distributed.ProcessGroup,
        *,
        in_background: bool,
        keep_last: int,
        keep_every: int,
    ):
        self._directory = directory
        self._group = group
        self._in_background = in_background
        self._keep = {"keep_last": keep_last, "keep_every": keep_every}
        self._thread: threading.Thread | None = None
        self._outcomes: SimpleQueue[Outcome] = SimpleQueue()

    def save(self, tensors: StateDict, manifest: Manifest, expected: Set[str]) -> None:
        """Save `tensors` as the checkpoint of `manifest.step`. Failures are told by `outcomes`, not raised.

        `expected` names what the tensors of all ranks together must hold.
        """
        self.wait()
        if not self._in_background:
            self._write(tensors, manifest, expected)
            return
        # A daemon: a run that is being killed must not wait for ranks that are gone.
        self._thread = threading.Thread(target=self._write, args=(_host_copy(tensors), manifest, expected), daemon=True)
        self._thread.start()

    def outcomes(self) -> list[Outcome]:
        """What has ended since the last call."""
        return [self._outcomes.get() for _ in range(self._outcomes.qsize())]

    def wait(self) -> None:
        """Return when nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, tensors: StateDict, manifest: Manifest, expected: Set[str]) -> None:
        step, failure = manifest.step, None
        try:
            self._write_together(tensors, manifest, expected)
        except BaseException as error:
            failure = str(error) if isinstance(error, RankError) else f"{type(error).__name__}: {error}"
            if self._group.rank() == 0:
                self._directory.abort(step)
            if not isinstance(error, Exception):
                raise
        finally:
            self._outcomes.put(Outcome(step, self._directory.path(step), failure))

    def _write_together(self, tensors: StateDict, manifest: Manifest, expected: Set[str]) -> None:
        """All stages of a save; each ends on every rank before the next begins on any. Raises `RankError`."""
        step, rank, staging = manifest.step, self._group.rank(), self._directory.staging(manifest.step)

        def begin() -> list[str]:
            if rank == 0:
                self._directory.begin(step)
            return [name for name, value in tensors.items() if not isinstance(value, Rectangles)]

        def finish() -> None:
            if rank == 0:
                sync(completed(manifest, written, expected).write(staging))
                sync(staging)
                self._commit(step)

        writers = _writers(of_every_rank(begin, self._group))
        mine = {name: value for name, value in tensors.items() if writers.get(name, rank) == rank}
        written = of_every_rank(lambda: write(staging, rank, mine), self._group)
        of_every_rank(finish, self._group)

    def _commit(self, step: int) -> None:
        self._directory.commit(step)
        try:
            # Saved it is, whatever becomes of this; old ones stay while `latest` may name one of them.
            self._directory.name_latest(step)
            self._directory.retain(step, **self._keep)
        except OSError as error:
            told = "step %d is saved, but `latest` may name an older checkpoint, and too many may be kept: %s"
            logging.getLogger(__name__).warning(told, step, error)


def _host_copy(tensors: StateDict) -> StateDict:
    return {
        name: value.copied_to_host() if isinstance(value, Rectangles) else value.to("cpu", copy=True)
        for name, value in tensors.items()
    }


def _writers(replicated: list[list[str]]) -> dict[str, int]:
    """Which rank writes each of the tensors that the ranks have wholly: of those that have it, each in its turn."""
    holders: dict[str, list[int]] = {}
    for rank, names in enumerate(replicated):
        for name in names:
            holders.setdefault(name, []).append(rank)
    return {name: ranks[index % len(ranks)] for index, (name, ranks) in enumerate(holders.items())}
