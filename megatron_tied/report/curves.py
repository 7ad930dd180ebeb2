"""What is done to series before they are drawn."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from megatron_tied.report.history_lines import Series

DRAWN_POINTS = 2000
# Of all points, on each side of the one that becomes their mean.
_SMOOTHED_SHARE = 0.01


def thinned(series: Series, most: int = DRAWN_POINTS) -> Series:
    """At most `most` (>= 4) of the points, with both ends and the least and largest value of every stretch."""
    steps, values = series
    if len(steps) <= most:
        return series
    edges = np.linspace(0, len(steps), (most - 2) // 2 + 1).astype(int)
    kept = {0, len(steps) - 1}
    for begin, end in pairwise(edges):
        kept |= {begin + int(values[begin:end].argmin()), begin + int(values[begin:end].argmax())}
    chosen = sorted(kept)
    return Series(steps[chosen], values[chosen])


def smoothed(series: Series, reach: int | None = None) -> Series:
    """Means of each point with `reach` points on either side; by default a hundredth of all points.

    Near the start, where losses fall steeply, with as many as there are on both sides: a straight line stays what it
    is. Near the end with all that there are after it, so that the last point is not the noise of one step.
    """
    steps, values = series
    count = len(values)
    reach = int(count * _SMOOTHED_SHARE) if reach is None else reach
    positions = np.arange(count)
    before = np.minimum(reach, positions)
    after = np.minimum(before, count - 1 - positions)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    means = (sums[positions + after + 1] - sums[positions - before]) / (before + after + 1)
    return Series(steps, means)


def difference(series: Series, first: Series) -> Series | None:
    """`series` minus `first` at the steps that both have; None if there are none."""
    common, ours, theirs = np.intersect1d(series.steps, first.steps, return_indices=True)
    return Series(common, series.values[ours] - first.values[theirs]) if len(common) else None
