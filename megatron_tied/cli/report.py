"""How bad input is told to people: plain lines that can be searched for."""

from __future__ import annotations

from typing import TextIO

from megatron_tied.errors import ConfigError


def report(error: ConfigError, stream: TextIO) -> None:
    """Writes how many problems there are, then one line for each: field, value, what is valid."""
    count = len(error.problems)
    stream.write(f"error: {count} problem{'' if count == 1 else 's'} in the configuration\n")
    for problem in error.problems:
        stream.write(f"  {problem}\n")
