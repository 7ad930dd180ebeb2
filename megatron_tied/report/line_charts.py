"""Charts over the steps of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_tied.report.chart_style import Drawing, Key, new_figure, run_colour, run_keys
from megatron_tied.report.curves import smoothed, thinned
from megatron_tied.report.history_lines import Series
from megatron_tied.report.svg import CARD, INK

_MARKED_POINTS = 40
# The share of the steps whose values need not fit into a chart that leaves out the start.
_START = 0.05
_MOST_TAGS = 12
_TAG_HEIGHT = 0.055  # of the axes


@dataclass(frozen=True)
class Curve:
    """A series of the run number `run`. smooth: a running mean over the faint points; tag: stands at its end."""

    run: int
    series: Series
    dashed: bool = False
    smooth: bool = False
    tag: str = ""


def line_chart(
    names: Sequence[str],
    curves: Sequence[Curve],
    label: str,
    *,
    solid: str = "",
    dashed: str = "",
    from_zero: bool = False,
    zero_line: bool = False,
    without_start: bool = False,
) -> Drawing | None:
    """Curves over the steps; None if there is nothing to draw.

    solid, dashed: what such lines mean. without_start: the values of the first steps may lie above the chart.
    """
    drawn = [(curve, finite) for curve in curves if (finite := curve.series.finite()) is not None]
    if not drawn:
        return None
    figure, axes = new_figure()
    for curve, series in drawn:
        _draw(axes, curve, series)
    if zero_line:
        axes.axhline(0, color=INK, linewidth=0.8)
    if from_zero:
        axes.set_ylim(bottom=0)
    if without_start:
        _leave_out_start(axes, [series for _, series in drawn])
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    _tag(axes, drawn)
    return Drawing(figure, [*run_keys(names, {curve.run for curve, _ in drawn}), *_kinds(drawn, solid, dashed)])


def _kinds(drawn: Sequence[tuple[Curve, Series]], solid: str, dashed: str) -> list[Key]:
    return [Key(solid, "solid"), Key(dashed, "dashed")] if any(curve.dashed for curve, _ in drawn) else []


def _draw(axes: Axes, curve: Curve, series: Series) -> None:
    colour, line = run_colour(curve.run), series
    if curve.smooth:
        line = smoothed(series)
        if (line.values != series.values).any():
            axes.plot(*thinned(series), color=colour, alpha=0.3, linewidth=0.8)
    points = thinned(line)
    axes.plot(
        *points,
        color=colour,
        linewidth=1.6,
        linestyle="--" if curve.dashed else "-",
        marker="o" if len(points.steps) <= _MARKED_POINTS else "",
        markersize=3,
    )


def _leave_out_start(axes: Axes, drawn: Sequence[Series]) -> None:
    start = max(series.steps[-1] for series in drawn) * _START
    later = np.concatenate([series.values[series.steps > start] for series in drawn])
    if len(later) and later.max() > later.min():
        margin = 0.06 * (later.max() - later.min())
        axes.set_ylim(later.min() - margin, later.max() + margin)


def _tag(axes: Axes, drawn: Sequence[tuple[Curve, Series]]) -> None:
    """Write the tags at the ends of their curves, those that would overlap above each other."""
    tagged = sorted(
        ((series.values[-1], series.steps[-1], curve) for curve, series in drawn if curve.tag), key=lambda end: end[0]
    )
    if not tagged or len(tagged) > _MOST_TAGS:
        return
    low, high = axes.get_ylim()
    apart = _TAG_HEIGHT * (high - low)
    taken: dict[int, float] = {}
    for value, step, curve in tagged:
        height = max(value, taken.get(step, low) + apart)
        taken[step] = height
        axes.annotate(
            curve.tag,
            (step, height),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=run_colour(curve.run),
            fontsize=9,
            bbox={"facecolor": CARD, "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
    axes.set_ylim(low, max(high, *taken.values()))
