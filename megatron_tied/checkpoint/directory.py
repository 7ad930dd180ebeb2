"""A run's `checkpoints/`: a directory for each step, named when it is complete, and `latest`, which names one."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from megatron_tied.checkpoint.manifest import NAME as MANIFEST
from megatron_tied.checkpoint.manifest import BrokenCheckpointError
from megatron_tied.files import sync, write_whole
from megatron_tied.run_directory import CHECKPOINTS, METRICS, run_inside

LATEST = "latest"
_STEP = re.compile(r"step_(\d{8,})")


class CheckpointDirectory:
    """Names, appears and disappears checkpoints; one process does so at a time, any number may read."""

    def __init__(self, root: Path):
        self.root = root

    def path(self, step: int) -> Path:
        """The checkpoint of `step`."""
        return self.root / f"step_{step:08d}"

    def staging(self, step: int) -> Path:
        """Where the checkpoint of `step` is written."""
        return self.root / f".step_{step:08d}.partial"

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, sound or not, newest first."""
        if not self.root.is_dir():
            return []
        found = (_STEP.fullmatch(entry.name) for entry in self.root.iterdir() if entry.is_dir())
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def latest(self) -> Path | None:
        """The checkpoint that `latest` names; None without it. Raises `BrokenCheckpointError` if it names none."""
        try:
            name = (self.root / LATEST).read_bytes().decode(errors="replace").strip()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise BrokenCheckpointError(self.root / LATEST, f"cannot be read: {error.strerror}") from None
        if not _STEP.fullmatch(name):
            raise BrokenCheckpointError(self.root / LATEST, f"does not name a checkpoint: {name[:40]!r}")
        if not (self.root / name).is_dir():
            raise BrokenCheckpointError(self.root / LATEST, f"names {name}, which is not there")
        return self.root / name

    def begin(self, step: int) -> None:
        """Make an empty staging directory, and remove what killed runs have left of theirs."""
        for remnant in self.root.glob(".step_*"):
            # Another step's may be held open, by somebody's reading on NFS: this save does without its place.
            shutil.rmtree(remnant, ignore_errors=remnant != self.staging(step))
        for remnant in self.root.glob(f".{LATEST}.*"):
            remnant.unlink()
        self.staging(step).mkdir()

    def commit(self, step: int) -> None:
        """Give the checkpoint of `step`, whose files are on the device, its name: from here on it is one."""
        final, replaced = self.path(step), self.root / f".step_{step:08d}.replaced"
        if final.exists():
            # Of an earlier attempt, and found broken: a sound one would have been resumed from.
            os.rename(final, replaced)
        os.rename(self.staging(step), final)
        sync(self.root)
        shutil.rmtree(replaced, ignore_errors=True)

    def name_latest(self, step: int) -> None:
        """Let `latest` name the checkpoint of `step`."""
        write_whole(self.root / LATEST, self.path(step).name + "\n")

    def abort(self, step: int) -> None:
        """Remove what is left of a failed attempt."""
        shutil.rmtree(self.staging(step), ignore_errors=True)

    def retain(self, newest: int, *, keep_last: int, keep_every: int) -> None:
        """Remove checkpoints older than the `keep_last` newest, but for steps that `keep_every` (if not 0) divides.

        `newest` is the step of one that has just been verified: it and newer ones stay whatever the numbers say.
        """
        older = [step for step in self.steps() if step < newest]
        for step in older[max(0, keep_last - 1) :]:
            if not (keep_every and step % keep_every == 0):
                # Renamed first: what is removed in part has no checkpoint's name.
                doomed = self.root / f".step_{step:08d}.removed"
                os.rename(self.path(step), doomed)
                shutil.rmtree(doomed)


def how_to_go_on(run_dir: Path) -> str:
    """For a message about a run that has ended early: what it can go on from."""
    steps = CheckpointDirectory(run_dir / CHECKPOINTS).steps()
    if not steps:
        return "has no checkpoint"
    return f"has a checkpoint of step {steps[0]}; to go on after it, start it again (train.resume: auto)"


def resolve(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or what `latest` names in it or in its `checkpoints`.

    Raises `BrokenCheckpointError` for anything else.
    """
    for root in (path, path / CHECKPOINTS):
        named = CheckpointDirectory(root).latest()
        if named is not None:
            return named
    if (path / METRICS).is_file():
        raise BrokenCheckpointError(path, "is a run without a checkpoint so far")
    if not (path / MANIFEST).exists() and (run := run_inside(path)):
        raise BrokenCheckpointError(path, f"is no run, but {run} in it is one")
    return path
