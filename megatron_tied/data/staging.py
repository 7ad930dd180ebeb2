"""A data set's files come into being all at once: written in a hidden directory, renamed when complete.

What takes days to write can be saved on the way: an interrupted run is then gone on with by the next one.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.files import sync, write_whole

# The order of renaming. Megatron-Core takes PREFIX.idx for a finished data set, we take PREFIX.json.
_SUFFIXES = (".model", ".bin", ".idx", ".json")
# What a run goes on with: files that only grow, and a file that says how long they were at the last save.
_GROWING, _SAVED = (".bin", ".lengths"), ".saved"


class Staging:
    """Context manager for writing the files `prefix` + suffix; what is not committed is removed on leaving.

    A killed run leaves only the hidden directory, which the next run for the same prefix clears; but what was saved
    stays, and `saved` is what `save` was told, if the next run makes the same `request`. Raises `ConfigError` when
    another run is writing the prefix, or, `overwrite` being false, when it exists or was begun with another request; a
    file `prefix` + ".model" counts only when it would be replaced (`writes_model`).
    """

    saved: Mapping[str, Any] | None = None

    def __init__(
        self, prefix: Path, *, overwrite: bool, writes_model: bool, request: Mapping[str, object] | None = None
    ) -> None:
        self.prefix = prefix
        self.directory = prefix.parent / f".{prefix.name}.partial"
        self._overwrite = overwrite
        self._own = _SUFFIXES if writes_model else _SUFFIXES[1:]
        self._request = request

    def __enter__(self) -> Staging:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path(".lock"), os.O_CREAT | os.O_RDWR)
        try:
            self._take_lock()
            self._refuse_existing()
            self.saved = self._restored()
        except BaseException:
            os.close(self._lock)
            raise
        if self.saved is None:
            for suffix in (_SAVED, *_SUFFIXES, *_GROWING):
                self.path(suffix).unlink(missing_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or not self.path(_SAVED).exists():
            shutil.rmtree(self.directory)
        os.close(self._lock)

    def path(self, suffix: str) -> Path:
        """Where to write the file that will be `prefix` + `suffix`."""
        return self.directory / (self.prefix.name + suffix)

    def save(self, progress: Mapping[str, object]) -> None:
        """Make what .bin and .lengths hold durable, with `progress`, in JSON, for a run that goes on from here."""
        for suffix in _GROWING:
            sync(self.path(suffix))
        sizes = {suffix: self.path(suffix).stat().st_size for suffix in _GROWING}
        saved = {"request": self._request, "sizes": sizes, "progress": progress}
        write_whole(self.path(_SAVED), json.dumps(saved))

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
        if not (self._is_locked() and self._is_there()):
            raise ConfigError(self._problem("is being written by another run"))

    def _is_locked(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return True
        return True

    def _is_there(self) -> bool:
        """Not so when the run that held the lock has just removed its directory, lock and all."""
        try:
            return os.path.samestat(os.fstat(self._lock), os.stat(self.path(".lock")))
        except OSError:
            return False

    def _refuse_existing(self) -> None:
        # With its metadata still staged, a run died while renaming: the other files are remnants of it.
        remnants = self.path(".json").exists() and not self._final(".json").exists()
        existing = [str(self._final(suffix)) for suffix in self._own if self._final(suffix).exists()]
        if existing and not remnants and not self._overwrite:
            if not self.path(_SAVED).exists():
                shutil.rmtree(self.directory)
            raise ConfigError(self._problem(f"exists ({', '.join(existing)}); --overwrite replaces it"))

    def _restored(self) -> Mapping[str, Any] | None:
        """What was saved, its files as long as they were then; None if there is nothing to go on with."""
        try:
            saved: dict[str, Any] = json.loads(self.path(_SAVED).read_text())
        except FileNotFoundError:
            return None
        if saved["request"] != self._request:
            if self._overwrite:
                return None
            raise ConfigError(self._problem(f"{_difference(saved['request'], self._request)}; --overwrite starts anew"))
        paths = {self.path(suffix): size for suffix, size in saved["sizes"].items()}
        # They are gone when a run died while renaming.
        if any(not path.exists() or path.stat().st_size < size for path, size in paths.items()):
            return None
        for path, size in paths.items():
            os.truncate(path, size)
        progress: dict[str, Any] = saved["progress"]
        return progress

    def _final(self, suffix: str) -> Path:
        return self.prefix.with_name(self.prefix.name + suffix)

    def _problem(self, valid: str) -> Problem:
        return Problem("--output", str(self.prefix), valid)


def _difference(begun: Mapping[str, object], asked: Mapping[str, object] | None) -> str:
    """How an unfinished data set differs from what is asked for."""
    if asked is None:
        return f"is an unfinished data set of {begun['dataset']}"
    fields = [f"{key} {value!r}, not {asked.get(key)!r}" for key, value in begun.items() if value != asked.get(key)]
    return f"was begun with {'; '.join(fields)}"
