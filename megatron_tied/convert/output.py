"""The directory that a conversion writes: under its name it is complete, or not there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.files import sync

# Of headers, tokenizer and configs, and what file systems need on top.
_MARGIN_BYTES = 16 << 20


def check_output(path: Path) -> None:
    """Raise `ConfigError` unless `path` is an empty directory or nothing yet, in a directory that is there."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        kind = "is a directory that is not empty" if path.is_dir() else "is a file"
        raise ConfigError(Problem("--output", str(path), f"{kind}: name a new one"))
    if not path.absolute().parent.is_dir():
        raise ConfigError(Problem("--output", str(path), f"must lie in a directory that exists: {path.parent}"))


def check_space(path: Path, needed: int) -> None:
    """Raise `ConfigError` if the file system of `path` has less than `needed` bytes free, and some more."""
    free = shutil.disk_usage(path.absolute().parent).free
    if free < needed + _MARGIN_BYTES:
        valid = f"needs {_gigabytes(needed + _MARGIN_BYTES)} and its file system has {_gigabytes(free)} free"
        raise ConfigError(Problem("--output", str(path), valid))


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """A directory beside `path` for what is too large for memory; it is removed when the context ends."""
    directory = path.absolute().with_name(f".{path.absolute().name}.scratch")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """A staging directory beside `path` that gets its name if the context ends without an error, and else is removed.

    What a killed conversion to the same place has left is removed first.
    """
    staging = path.absolute().with_name(f".{path.absolute().name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        for entry in [*staging.rglob("*"), staging]:
            sync(entry)
        # An empty directory of this name is replaced by it.
        staging.rename(path.absolute())
        sync(path.absolute().parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"
