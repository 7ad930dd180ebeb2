"""Files of the user's, read as they are and replaced whole: bytes, mode and links."""

from __future__ import annotations

from pathlib import Path

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.files import write_whole


def read_text(path: Path) -> str:
    """The text of a file, line endings included. Raises ConfigError if there is none, or it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(Problem("FILE", str(path), f"must be a file that can be read: {error.strerror}")) from None
    except UnicodeDecodeError:
        raise ConfigError(Problem("FILE", str(path), "must be UTF-8 text")) from None


def replace_text(path: Path, text: str, like: Path) -> None:
    """Make `text` the content of `path` in one step, with the mode of the file `like`. Raises ConfigError."""
    try:
        # A link stays one: what it names is replaced.
        write_whole(path.resolve(), text, like)
    except OSError as error:
        raise ConfigError(Problem("FILE", str(path), f"must be a place to write to: {error.strerror}")) from None
