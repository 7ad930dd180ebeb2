"""The directory that a conversion writes: under its name it is complete, or not there."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.files import sync

# Of headers, tokenizer and configs, and what file systems need on top.
_MARGIN_BYTES = 16 << 20


def absolute(path: Path) -> Path:
    """`path` from the root, with its own name at the end: what it is now, though the working directory be replaced."""
    whole = path.absolute()
    return whole.parent.resolve() / whole.name if whole.name not in ("", "..") else whole.resolve()


def is_complete(path: Path) -> bool:
    """Whether something has been published there."""
    return path.is_dir() and any(path.iterdir())


def check_output(path: Path) -> None:
    """Raise `ConfigError` unless `path` is an empty directory or nothing yet, in a directory that is there.

    It must be one that another directory can take the place of: a mount point or a link cannot be replaced so.
    """
    if path.is_symlink():
        valid = f"is a symbolic link, which would be replaced: name a directory itself, such as {path.resolve()}"
    elif path.exists() and not path.is_dir():
        valid = "is a file: name a new one"
    elif os.path.ismount(path):
        valid = f"is a mount point, whose place nothing can take: name a directory in it, such as {path / 'model'}"
    elif not path.parent.is_dir():
        valid = f"must lie in a directory that exists: {path.parent}"
    elif path.exists() and any(path.iterdir()):
        valid = "is a directory that is not empty: name a new one"
    else:
        return
    raise ConfigError(Problem("--output", str(path), valid))


def check_space(path: Path, needed: int) -> None:
    """Raise `ConfigError` if the file system of `path` has less than `needed` bytes free, and some more."""
    free = shutil.disk_usage(path.parent).free
    if free < needed + _MARGIN_BYTES:
        valid = f"needs {_gigabytes(needed + _MARGIN_BYTES)} and its file system has {_gigabytes(free)} free"
        raise ConfigError(Problem("--output", str(path), valid))


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """No other process converts to `path` while the context lasts. Raises `ConfigError` if it cannot be written."""
    check_output(path)
    name = _beside(path, "lock")
    try:
        lock = name.open("a")
    except OSError as error:
        valid = f"must lie in a directory that can be written: {error.strerror}"
        raise ConfigError(Problem("--output", str(path), valid)) from None
    with lock:
        if not _is_taken(lock.fileno(), name):
            valid = "is being written by another conversion: wait for its end, or name another"
            raise ConfigError(Problem("--output", str(path), valid))
        try:
            # The other may have ended between the first look and now.
            check_output(path)
            yield
        finally:
            name.unlink(missing_ok=True)


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """A directory beside `path` for what is too large for memory; it is removed when the context ends."""
    with _temporary(_beside(path, "scratch")) as directory:
        yield directory


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """A staging directory beside `path` that gets its name if the context ends without an error, and else is removed.

    What a killed conversion to the same place has left is removed first.
    """
    with _temporary(_beside(path, "partial")) as staging:
        yield staging
        for entry in [*staging.rglob("*"), staging]:
            sync(entry)
        # An empty directory of this name is replaced by it.
        staging.rename(path)
        sync(path.parent)


@contextmanager
def _temporary(directory: Path) -> Iterator[Path]:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _beside(path: Path, kind: str) -> Path:
    """A hidden name beside `path`; of a long one, which would be too long then, a digest."""
    name = f".{path.name}.{kind}"
    if len(os.fsencode(name)) > os.pathconf(path.parent, "PC_NAME_MAX"):
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.{kind}"
    return path.with_name(name)


def _is_taken(descriptor: int, name: Path) -> bool:
    """Take the lock that lies open under `name`; whether that went well."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    try:
        # Not the same when who held it has just removed it.
        return os.path.samestat(os.fstat(descriptor), name.stat())
    except FileNotFoundError:
        return False


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"
