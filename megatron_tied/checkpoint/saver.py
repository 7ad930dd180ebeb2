"""Saving: collective, atomic, and on request in the background while training goes on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch
from torch.distributed.checkpoint import CheckpointException, save

from megatron_tied.checkpoint.directory import CheckpointDirectory
from megatron_tied.checkpoint.manifest import Manifest
from megatron_tied.checkpoint.rectangles import Rectangles, RectanglesSavePlanner, StateDict
from megatron_tied.checkpoint.storage import SafetensorsWriter


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
        step = manifest.step
        writer = SafetensorsWriter(
            self._directory.staging(step),
            manifest,
            expected,
            begin=lambda: self._directory.begin(step),
            commit=lambda: self._commit(step),
        )
        failure = None
        try:
            save(
                tensors,
                storage_writer=writer,
                planner=RectanglesSavePlanner(),
                process_group=self._group,
            )
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            failure = _reason(error)
            if self._group.rank() == 0:
                self._directory.abort(step)
        self._outcomes.put(Outcome(step, self._directory.path(step), failure))

    def _commit(self, step: int) -> None:
        self._directory.commit(step)
        try:
            # Saved it is, whatever becomes of this; old ones stay while `latest` may name one of them.
            self._directory.name_latest(step)
            self._directory.retain(step, **self._keep)
        except OSError as error:
            logging.getLogger(__name__).warning("old checkpoints, and what `latest` names, were left: %s", error)


def _host_copy(tensors: StateDict) -> StateDict:
    return {
        name: value.copied_to_host() if isinstance(value, Rectangles) else value.to("cpu", copy=True)
        for name, value in tensors.items()
    }


def _reason(error: BaseException) -> str:
    if not isinstance(error, CheckpointException):
        return f"{type(error).__name__}: {error}"
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {cause}"
