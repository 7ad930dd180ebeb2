"""Charts of single values: bars of runs, and levels of banks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.ticker import MaxNLocator

from megatron_tied.report.chart_style import Drawing, Key, new_figure, part_colours, plain, run_colour, run_keys
from megatron_tied.report.svg import INK

_WRITTEN_SHARE = 0.07  # of the longest bar: a part as wide has room for its percentage


@dataclass(frozen=True)
class Bar:
    """Parts, from the left, of the run number `run`, and what is written above them. planned: where a mark stands."""

    run: int
    text: str
    parts: Mapping[str, float]
    planned: float | None = None


@dataclass(frozen=True)
class Level:
    """A value that some layers have in common; hollow: drawn as a ring."""

    run: int
    layers: Sequence[int]
    value: float
    hollow: bool


def bar_chart(bars: Sequence[Bar], label: str) -> Drawing | None:
    """Horizontal bars below each other, or None if there are none; several parts have colours of their own."""
    if not bars:
        return None
    figure, axes = new_figure(height=1.0 + 0.55 * len(bars))
    parts = list(dict.fromkeys(part for bar in bars for part in bar.parts))
    colours = part_colours(parts)
    longest = max(sum(bar.parts.values()) for bar in bars)
    for place, bar in enumerate(bars):
        if len(parts) > 1:
            _draw_parts(axes, place, bar, colours, longest)
        else:
            axes.barh(place, sum(bar.parts.values()), height=0.42, color=run_colour(bar.run))
        if bar.planned is not None:
            axes.plot([bar.planned] * 2, [place - 0.28, place + 0.28], color=INK, linewidth=2)
        axes.annotate(
            plain(bar.text), (0, place - 0.26), xytext=(1, 1), textcoords="offset points", va="bottom", color=INK
        )
    axes.set_ylim(len(bars) - 0.6, -0.75)
    axes.set_xlim(left=0)
    axes.set_yticks([])
    axes.grid(False, axis="y")
    axes.set_xlabel(label)
    keys = [Key(part, "box", colours[part]) for part in parts] if len(parts) > 1 else []
    return Drawing(figure, keys or ([Key("planned", "upright")] if any(bar.planned for bar in bars) else []))


def level_chart(
    names: Sequence[str], levels: Sequence[Level], label: str, over: str, *, full: str, hollow: str
) -> Drawing | None:
    """Values of banks at the layers that use them, joined; None if there are none.

    over: what the x axis counts. full, hollow: what dots and rings mean, where there are rings.
    """
    if not levels:
        return None
    figure, axes = new_figure()
    runs = sorted({level.run for level in levels})
    for level in levels:
        # Side by side where runs have the same value.
        shift = 0.12 * (runs.index(level.run) - (len(runs) - 1) / 2)
        axes.plot(
            [layer + shift for layer in level.layers],
            [level.value] * len(level.layers),
            color=run_colour(level.run),
            marker="o",
            markersize=5,
            markerfacecolor="none" if level.hollow else run_colour(level.run),
            linewidth=1.6,
            linestyle=":" if level.hollow else "-",
        )
    axes.set_xlabel(over)
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    axes.margins(x=0.04, y=0.12)
    kinds = [Key(full, "dot"), Key(hollow, "ring")] if any(level.hollow for level in levels) else []
    return Drawing(figure, [*run_keys(names, set(runs)), *kinds])


def _draw_parts(axes: Axes, place: int, bar: Bar, colours: Mapping[str, str], longest: float) -> None:
    begin, total = 0.0, sum(bar.parts.values())
    for part, size in bar.parts.items():
        axes.barh(place, size, left=begin, height=0.42, color=colours[part])
        if size >= _WRITTEN_SHARE * longest:
            middle = (begin + size / 2, place)
            ink = _ink_on(colours[part])
            axes.annotate(f"{size / total:.0%}", middle, ha="center", va="center", color=ink, fontsize=9)
        begin += size


def _ink_on(colour: str) -> str:
    """Black or white, what is read on `colour`. Source: relative luminance with Rec. 709 weights."""
    red, green, blue = to_rgb(colour)
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.45 else "white"
