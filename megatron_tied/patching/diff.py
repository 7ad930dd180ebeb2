"""The difference of two texts, for people."""

from __future__ import annotations

from difflib import unified_diff

from rich.text import Text

_STYLES = (("+++", "bold"), ("---", "bold"), ("@@", "cyan"), ("+", "green"), ("-", "red"))


def diff(before: str, after: str, name: str) -> Text:
    """A unified diff; its colours show on a terminal only."""
    text = Text(no_wrap=True)
    for line in unified_diff(before.splitlines(), after.splitlines(), name, name, lineterm=""):
        style = next((style for start, style in _STYLES if line.startswith(start)), "")
        text.append(f"{line}\n", style)
    return text
