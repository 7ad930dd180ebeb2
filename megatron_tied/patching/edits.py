"""Changes of a text at exact places: whatever is not edited stays, byte for byte."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Edit(NamedTuple):
    """Put `text` in place of the characters from `start` up to `end`; nothing is taken out where they are equal."""

    start: int
    end: int
    text: str


class Line(NamedTuple):
    """The physical line around a place: where it starts, where it ends, and what ends it."""

    start: int
    end: int
    newline: str


def apply_edits(text: str, edits: Iterable[Edit]) -> str:
    """`text` with all edits, which must not overlap."""
    for edit in sorted(edits, reverse=True):
        text = text[: edit.start] + edit.text + text[edit.end :]
    return text


def line_around(text: str, place: int) -> Line:
    """The line that `place` lies in; its `newline` is that of the file where the last line has none."""
    start = text.rfind("\n", 0, place) + 1
    end = text.find("\n", place)
    if end < 0:
        return Line(start, len(text), "\r\n" if "\r\n" in text else "\n")
    if end > start and text[end - 1] == "\r":
        return Line(start, end - 1, "\r\n")
    return Line(start, end, "\n")


def line_number(text: str, place: int) -> int:
    """The number of the line that `place` lies in, from 1."""
    return text.count("\n", 0, place) + 1
