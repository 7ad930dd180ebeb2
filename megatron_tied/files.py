"""Files that are there whole or not at all, also after a crash of the machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def sync(path: Path) -> None:
    """Flush a file or directory to its device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str, like: Path | None = None) -> None:
    """Make `text` the content of the file `path` in one step; a reader sees the old content or the new.

    Line endings stay as they are in `text`. like: a file whose mode it gets.
    """
    with replacing(path, like) as stream:
        stream.write(text.encode("utf-8"))


@contextmanager
def replacing(path: Path, like: Path | None = None) -> Iterator[BinaryIO]:
    """What is written into the stream becomes the content of `path` in one step, if the context ends without an error.

    A link stays one, and a device or pipe is written to as it is. like: a file whose mode it gets.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        with path.open("wb") as stream:
            yield stream
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            yield stream
        if like is not None:
            shutil.copymode(like, partial)
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)
