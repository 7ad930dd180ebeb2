"""Runs side by side in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_tied.report.figure_text import NOT_LOGGED, run_names
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


def remarks(runs: Sequence[RunHistory]) -> list[str]:
    """What the reader should know about how the runs were read."""
    told = []
    for name, run in zip(run_names([run.directory for run in runs]), runs, strict=True):
        if run.config.problem is not None:
            told.append(f"{name}: {run.config.problem}; its metrics are reported all the same")
        if run.broken_lines:
            lines = "1 broken line" if run.broken_lines == 1 else f"{run.broken_lines:,} broken lines"
            told.append(f"{name}: left out: {lines} of metrics.jsonl")
    return told


def _text(cell: Cell) -> Text:
    text = Text(cell.text, style="dim" if cell.text == NOT_LOGGED else "")
    if cell.difference:
        text.append(f"  ({cell.difference})", style="cyan")
    return text
