"""One supervisor for a run directory."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.training.run_lock import locked

NAME = ".supervise.lock"


class Lock:
    """Held while entered; the operating system lets go of it, however the process ends.

    Entering makes the run directory. Raises `ConfigError` where that cannot be, or where another process holds it.
    """

    def __init__(self, run_dir: Path):
        self._run_dir = run_dir

    def __enter__(self) -> Self:
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            found = locked(self._run_dir / NAME)
        except OSError as error:
            valid = f"must be a directory that can be written: {error.strerror}"
            raise ConfigError(Problem("train.run_dir", str(self._run_dir), valid)) from None
        if isinstance(found, str):
            valid = f"must not be supervised twice, and is by {found}"
            raise ConfigError(Problem("train.run_dir", str(self._run_dir), valid))
        self._file = found
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
