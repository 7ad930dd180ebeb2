"""What a script's variables hold where it says so itself: nothing is run, and what it does not say stays unknown."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_tied.patching.expressions import integer
from megatron_tied.patching.shell_words import Assignment, Script

_REFERENCE = re.compile(r"\$\(\((?P<sum>.+?)\)\)|\$(?P<name>\w+)|\$\{(?P<braces>[^{}]*)\}")
_BRACES = re.compile(r"(?P<name>\w+)(?:\[[@*]\])?(?::?[-=](?P<default>.*))?", re.DOTALL)
_MOST = 8  # nested references; more is a circle


class Variables:
    """The values that every variable may have, in the order of the script's assignments."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[str | None, ...]] = {}

    def assign(self, one: Assignment) -> None:
        """Follow an assignment: a conditional one adds a value to those that there may be."""
        before = self._values.get(one.name, ())
        values: tuple[str | None, ...] = (self.resolved(one.value.strip("()") if one.value[:1] == "(" else one.value),)
        if one.appends:
            values = tuple(
                None if old is None or values[0] is None else f"{old} {values[0]}".strip() for old in before or ("",)
            )
        self._values[one.name] = tuple(dict.fromkeys((*before, *values))) if one.conditional else values

    def resolved(self, text: str) -> str | None:
        """`text` without quotes and variables, or None if it depends on what the script does not say."""
        if re.fullmatch(r"'[^']*'", text):
            return text[1:-1]
        # A quote ends a name: `"$X"y` is not `$Xy`.
        named = re.sub(r"\$(\w+)(?=[\"'])", r"${\1}", text)
        found = self._filled(re.sub(r"(?<!\\)[\"']", "", named))
        return found if found is None or ("$" not in found and "`" not in found) else None

    def _filled(self, text: str) -> str | None:
        for _ in range(_MOST):
            match = _REFERENCE.search(text)
            if match is None:
                return text
            value = self._value(match)
            if value is None:
                return None
            text = text[: match.start()] + value + text[match.end() :]
        return None

    def _value(self, match: re.Match[str]) -> str | None:
        if (expression := match.group("sum")) is not None:
            return self._sum(expression)
        if match.group("name") is not None:
            return self._one(match.group("name"), None)
        braces = _BRACES.fullmatch(match.group("braces"))
        return self._one(braces.group("name"), braces.group("default")) if braces else None

    def _one(self, name: str, default: str | None) -> str | None:
        values = self._values.get(name)
        if values is None:
            return default
        return values[0] if len(values) == 1 else None

    def _sum(self, expression: str) -> str | None:
        names = re.sub(r"\$?\{?\b([A-Za-z_]\w*)\b\}?", lambda match: self._one(match.group(1), None) or "?", expression)
        value = integer(names)
        return None if value is None else str(value)


def followed(script: Script, variables: Variables) -> Iterator[int]:
    """The places of the script's groups, each when `variables` holds what has been assigned before it."""
    waiting = list(script.assignments)
    for index, group in enumerate(script.groups):
        while waiting and waiting[0].start + len(waiting[0].name) < group.start and _is_over(waiting[0], group.start):
            variables.assign(waiting.pop(0))
        yield index
    for one in waiting:
        variables.assign(one)


def _is_over(one: Assignment, place: int) -> bool:
    return one.start + len(one.name) + 1 + len(one.value) <= place
