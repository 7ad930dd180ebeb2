"""One supervisor for a run directory."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_tied.errors import ConfigError, Problem

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
            self._file = open(self._run_dir / NAME, "a+")
        except OSError as error:
            valid = f"must be a directory that can be written: {error.strerror}"
            raise ConfigError(Problem("train.run_dir", str(self._run_dir), valid)) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip()
            self._file.close()
            valid = f"must not be supervised twice, and is by {holder or 'another process'}"
            raise ConfigError(Problem("train.run_dir", str(self._run_dir), valid)) from None
        except OSError:  # a file system without locks
            pass
        self._file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=self._file, flush=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
