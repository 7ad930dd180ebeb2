"""How bad input is told to people: plain lines that can be searched for."""

from __future__ import annotations

import os
import sys
import time
from typing import TextIO

from megatron_tied.errors import ConfigError

BAD_INPUT = 2  # the exit code of argparse too
# A launcher kills all ranks as soon as one ends: the one that tells the reason is to end first.
PATIENCE_SECONDS = 10


def tell(error: ConfigError, stream: TextIO) -> None:
    """Writes how many problems there are, then one line for each: field, value, what is valid."""
    count = len(error.problems)
    stream.write(f"error: {count} problem{'' if count == 1 else 's'} in the input\n")
    for problem in error.problems:
        stream.write(f"  {problem}\n")


def tell_once(error: ConfigError) -> int:
    """Tells it and returns the exit code, on ranks other than the first after a wait.

    What the first rank finds, too, ends the job in that time; what one pipeline stage alone finds is told by it.
    """
    if int(os.environ.get("RANK", 0)) != 0:
        time.sleep(PATIENCE_SECONDS)
    tell(error, sys.stderr)
    return BAD_INPUT
