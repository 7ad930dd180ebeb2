"""Runs side by side in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_tied.report.figure_text import NOT_LOGGED, remarks, run_names
from megatron_tied.report.history import RunHistory
from megatron_tied.report.run_figures import Cell, row_groups


def terminal_report(runs: Sequence[RunHistory]) -> RenderableType:
    """A table with a column for each run; differences are to the first of them."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2))
    table.add_column("")
    for name in run_names([run.directory for run in runs]):
        table.add_column(Text(name), overflow="fold")
    for group in row_groups(runs):
        table.add_row()
        table.add_row(Text(group.title, style="bold"))
        for row in group.rows:
            table.add_row(Text(f"  {row.label}"), *map(_text, row.cells))
    told = [Text(remark) for remark in remarks(runs)]
    return Group(table, *([Text(), *told] if told else ()))


def _text(cell: Cell) -> Text:
    text = Text(cell.text, style="dim" if cell.text == NOT_LOGGED else "")
    if cell.difference:
        text.append(f"  ({cell.difference})", style="cyan")
    return text
