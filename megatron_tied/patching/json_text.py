"""Members of a JSON text and where they stand. Comments and trailing commas are kept: DeepSpeed reads them, too."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.patching.edits import line_number

_BLANK = re.compile(r"(?:\s|//[^\n]*|#[^\n]*|/\*.*?\*/)*", re.DOTALL)
_SCALAR = re.compile(r"-?\d[\d.eE+-]*|true|false|null|Infinity|-Infinity|NaN")
_STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"')


@dataclass(frozen=True)
class Member:
    """One member of an object: where its key starts, and where its value does and ends."""

    path: tuple[str, ...]
    start: int
    value_start: int
    value_end: int


def scan_json(text: str) -> tuple[dict[str, Any], list[Member]]:
    """An object and all members in it, nested ones too. Raises ConfigError if `text` is none."""
    scanner = _Scanner(text)
    scanner.blank()
    if not text.startswith("{", scanner.at):
        raise scanner.wrong("must be a JSON object")
    value = scanner.value(())
    scanner.blank()
    if scanner.at != len(text):
        raise scanner.wrong("must be the end of the file")
    return value, scanner.members


class _Scanner:
    def __init__(self, text: str):
        self.text, self.at = text, 0
        self.members: list[Member] = []

    def value(self, path: tuple[str, ...]) -> Any:
        self.blank()
        if self._takes("{"):
            return self._object(path)
        if self._takes("["):
            return self._list(path)
        if self.text.startswith('"', self.at):
            return self._string()
        match = _SCALAR.match(self.text, self.at)
        if match is None:
            raise self.wrong("must be a JSON value")
        try:
            value = json.loads(match.group())
        except ValueError:
            raise self.wrong("must be a number") from None
        self.at = match.end()
        return value

    def blank(self) -> None:
        if match := _BLANK.match(self.text, self.at):
            self.at = match.end()

    def wrong(self, valid: str) -> ConfigError:
        said = self.text[self.at : self.at + 20].split("\n")[0]
        return ConfigError(Problem(f"line {line_number(self.text, self.at)}", said, f"{valid}; nothing was changed"))

    def _object(self, path: tuple[str, ...]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not self._closes("}"):
            start = self.at
            key = self._string()
            if key in found:
                self.at = start
                raise self.wrong("must be there once")
            self.blank()
            if not self._takes(":"):
                raise self.wrong("must be a colon")
            self.blank()
            value_start = self.at
            found[key] = self.value((*path, key))
            self.members.append(Member((*path, key), start, value_start, self.at))
            self._separator("}")
        return found

    def _list(self, path: tuple[str, ...]) -> list[Any]:
        found = []
        while not self._closes("]"):
            # Members of objects in a list have no name of their own.
            inner = _Scanner(self.text)
            inner.at = self.at
            found.append(inner.value(path))
            self.at = inner.at
            self._separator("]")
        return found

    def _closes(self, closing: str) -> bool:
        self.blank()
        return self._takes(closing)

    def _separator(self, closing: str) -> None:
        self.blank()
        if not self._takes(",") and not self.text.startswith(closing, self.at):
            raise self.wrong(f'must be "," or "{closing}"')

    def _takes(self, char: str) -> bool:
        taken = self.text.startswith(char, self.at)
        self.at += taken
        return taken

    def _string(self) -> str:
        match = _STRING.match(self.text, self.at)
        if match is None:
            raise self.wrong("must be a name or text in double quotes")
        self.at = match.end()
        said: str = json.loads(match.group(), strict=False)
        return said
