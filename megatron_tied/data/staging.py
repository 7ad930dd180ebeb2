"""A data set's files come into being all at once: written in a hidden directory, renamed when complete."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.files import sync

# The order of renaming. Megatron-Core takes PREFIX.idx for a finished data set, we take PREFIX.json.
_SUFFIXES = (".model", ".bin", ".idx", ".json")


class Staging:
    """Context manager for writing the files `prefix` + suffix; what is not committed is removed on leaving.

    A killed run leaves only the hidden directory, which the next run for the same prefix clears. Raises
    `ConfigError` when another run is writing the prefix, or when it exists and `overwrite` is false; a file
    `prefix` + ".model" counts only when it would be replaced (`writes_model`).
    """

    def __init__(self, prefix: Path, *, overwrite: bool, writes_model: bool) -> None:
        self.prefix = prefix
        self.directory = prefix.parent / f".{prefix.name}.partial"
        self._overwrite = overwrite
        self._own = _SUFFIXES if writes_model else _SUFFIXES[1:]

    def __enter__(self) -> Staging:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path(".lock"), os.O_CREAT | os.O_RDWR)
        try:
            self._take_lock()
            self._refuse_existing()
        except BaseException:
            os.close(self._lock)
            raise
        for suffix in _SUFFIXES:
            self.path(suffix).unlink(missing_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.directory)
        os.close(self._lock)

    def path(self, suffix: str) -> Path:
        """Where to write the file that will be `prefix` + `suffix`."""
        return self.directory / (self.prefix.name + suffix)

    def commit(self) -> None:
        """Make the written files durable, then give them their names; whatever was there is gone first."""
        written = [suffix for suffix in _SUFFIXES if self.path(suffix).exists()]
        for suffix in written:
            sync(self.path(suffix))
        sync(self.directory)
        for suffix in (".json", ".idx"):
            self._final(suffix).unlink(missing_ok=True)
        try:
            for suffix in written:
                os.replace(self.path(suffix), self._final(suffix))
        except BaseException:
            for suffix in written:
                self._final(suffix).unlink(missing_ok=True)
            raise
        sync(self.prefix.parent)

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Not so when the run that held it has just removed its directory, lock and all.
            ours = os.path.samestat(os.fstat(self._lock), os.stat(self.path(".lock")))
        except OSError:
            ours = False
        if not ours:
            raise ConfigError(self._problem("is being written by another run"))

    def _refuse_existing(self) -> None:
        # With its metadata still staged, a run died while renaming: the other files are remnants of it.
        remnants = self.path(".json").exists() and not self._final(".json").exists()
        existing = [str(self._final(suffix)) for suffix in self._own if self._final(suffix).exists()]
        if existing and not remnants and not self._overwrite:
            shutil.rmtree(self.directory)
            raise ConfigError(self._problem(f"exists ({', '.join(existing)}); --overwrite replaces it"))

    def _final(self, suffix: str) -> Path:
        return self.prefix.with_name(self.prefix.name + suffix)

    def _problem(self, valid: str) -> Problem:
        return Problem("--output", str(self.prefix), valid)
