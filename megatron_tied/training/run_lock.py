"""One run in a run directory at a time."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from megatron_tied.errors import Problem

NAME = ".run.lock"


class RunLock:
    """Held by the first rank from `take` until the context ends."""

    def __init__(self, run_dir: Path):
        self._run_dir = run_dir
        self._file: IO[str] | None = None

    def take(self) -> Problem | None:
        """Take it, in a directory that is there; or what stands against it. Raises `OSError` for no file there."""
        found = locked(self._run_dir / NAME)
        if isinstance(found, str):
            valid = f"must not be that of a run that is at work, as {found} is: end it, or name another directory"
            return Problem("train.run_dir", str(self._run_dir), valid)
        self._file = found
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def locked(path: Path) -> IO[str] | str:
    """The file `path`, which this process holds until it is closed; or, in words, which process does. Raises `OSError`.

    The system lets go of it however the process ends; forked ones, such as a loader's workers, do not hold it.
    """
    file = path.open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        return holder
    except OSError:  # a file system without locks
        pass
    file.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    return file
