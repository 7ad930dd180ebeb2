"""Where commands print their tables."""

from __future__ import annotations

from rich.console import Console

_WIDTH = 160  # of a table that goes to a file


class _Output(Console):
    def on_broken_pipe(self) -> None:
        # rich's own would end the process with code 1.
        raise BrokenPipeError


def console() -> Console:
    """Standard output, as wide as the terminal, or wide enough for any table where there is none."""
    terminal = _Output(highlight=False)
    return terminal if terminal.is_terminal else _Output(highlight=False, width=_WIDTH)
