"""How charts look: a colour for each run everywhere, and axes in the colours of the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from megatron_tied.report.svg import GRID, INK

# Okabe and Ito, "Color Universal Design" (2008): those of it that are seen on white and on black, a lighter blue,
# and a darker orange.
_RUN_COLOURS = ("#2A7FC4", "#D55E00", "#009E73", "#CC79A7", "#B98300", "#7F7F7F")
_PART_COLOURS = "viridis"
_WIDTH = 5.8  # inches: two side by side on a page, and letters that can be read where one fills a telephone
_FONT_SIZE = 10
_LONGEST_NAME = 34


@dataclass(frozen=True)
class Key:
    """An entry of a legend. colour: None where the mark stands for something of every run."""

    text: str
    mark: Literal["box", "solid", "dashed", "upright", "dot", "ring"]
    colour: str | None = None


@dataclass(frozen=True)
class Drawing:
    """A figure and its legend, which the page sets: there it wraps, and letters keep their size."""

    figure: Figure
    keys: Sequence[Key] = field(default=())


def run_colour(run: int) -> str:
    """The colour of the run with this place in the order of runs; they repeat after six."""
    return _RUN_COLOURS[run % len(_RUN_COLOURS)]


def run_keys(names: Sequence[str], runs: set[int]) -> list[Key]:
    """The legend's entries of the runs that a chart shows; none where there is only one run at all."""
    return [Key(names[run], "box", run_colour(run)) for run in sorted(runs)] if len(names) > 1 else []


def part_colours(parts: Sequence[str]) -> dict[str, str]:
    """Colours from dark to light for the parts of a whole, which are no runs."""
    scale = mpl.colormaps[_PART_COLOURS]
    return {part: to_hex(scale(0.2 + 0.75 * place / max(1, len(parts) - 1))) for place, part in enumerate(parts)}


def new_figure(height: float = 2.9) -> tuple[Figure, Axes]:
    """An empty chart, `height` inches high."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(colors=INK, labelsize=_FONT_SIZE)
    axes.xaxis.label.set(color=INK, fontsize=_FONT_SIZE)
    axes.yaxis.label.set(color=INK, fontsize=_FONT_SIZE)
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_edgecolor(GRID)
    return figure, axes


def of_heat_map(figure: Figure) -> Drawing:
    """A finished heat map, with all that stands around its data in the colours of the page."""
    if figure.get_suptitle():
        figure.suptitle(figure.get_suptitle(), color=INK, fontsize=_FONT_SIZE + 1)
    for axes in figure.axes:
        axes.tick_params(which="both", colors=INK)
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            text.set_color(INK)
        for spine in axes.spines.values():
            spine.set_edgecolor(GRID)
    return Drawing(figure)


def shortened(name: str) -> str:
    """A long name without its middle: runs often differ at the end."""
    if len(name) <= _LONGEST_NAME:
        return name
    half = (_LONGEST_NAME - 3) // 2
    return f"{name[:half]}...{name[-half:]}"


def plain(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")
