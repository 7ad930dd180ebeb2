"""What the options of several commands have in common."""

from __future__ import annotations

import argparse
import math
from typing import TypeAlias

# At runtime the class takes no parameter.
Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

_LARGEST = 1e12


def count(text: str) -> int:
    """The value of an option: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer >= 1")
    return int(text)


def number(text: str) -> float:
    """The value of an option: a number, or NaN for what is none, which lies in no range."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def positive(text: str) -> float:
    """The value of an option: a number above 0, of any size that something has."""
    value = number(text)
    if not 0 < value < _LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number > 0 and < {_LARGEST:g}")
    return value
