"""Where commands print their tables."""

from __future__ import annotations

from rich.console import Console

_WIDTH = 160  # of a table that goes to a file


def console() -> Console:
    """Standard output, as wide as the terminal, or wide enough for any table where there is none."""
    terminal = Console(highlight=False)
    return terminal if terminal.is_terminal else Console(highlight=False, width=_WIDTH)
