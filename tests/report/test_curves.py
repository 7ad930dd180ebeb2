"""Thinning and smoothing, against what can be said without them."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_tied.report.curves import difference, smoothed, thinned
from megatron_tied.report.history_lines import Series


def series(values: np.ndarray) -> Series:
    return Series(np.arange(len(values)), np.asarray(values, dtype=float))


def test_few_points_stay_as_they_are() -> None:
    few = series(np.arange(100.0))
    assert thinned(few, 100) is few


@pytest.mark.parametrize("count", [101, 1_000, 200_000])
@pytest.mark.parametrize("most", [4, 5, 100])
def test_thinning_keeps_ends_and_extremes(count: int, most: int) -> None:
    values = np.random.default_rng(count).standard_normal(count)
    steps, kept = thinned(series(values), most)
    assert len(steps) <= most
    assert (steps[0], steps[-1]) == (0, count - 1)
    assert (np.diff(steps) > 0).all()
    assert (kept == values[steps]).all()
    assert (kept.min(), kept.max()) == (values.min(), values.max())


def test_every_spike_of_a_long_run_is_kept() -> None:
    values = np.zeros(200_000)
    spikes = np.arange(500, 200_000, 1_000)
    values[spikes] = np.arange(1, len(spikes) + 1)
    assert set(spikes) <= set(thinned(series(values)).steps)


def test_a_mean_of_neighbours() -> None:
    # At the start as many on both sides; at the end all that there are after it.
    assert smoothed(series([1, 5, 0, 4, 2, 6]), reach=2).values == pytest.approx([1, 2, 12 / 5, 17 / 5, 3, 4])


def test_a_straight_line_stays_straight_and_in_place_but_at_the_end() -> None:
    line = 3.0 - 0.5 * np.arange(1000)
    assert smoothed(series(line)).values[:-10] == pytest.approx(line[:-10])


def test_noise_becomes_as_much_smaller_as_a_mean_of_independent_values() -> None:
    noise = np.random.default_rng(0).standard_normal(100_000)
    middle = smoothed(series(noise), reach=12).values[100:-100]
    assert middle.std() == pytest.approx(1 / np.sqrt(25), rel=0.03)


def test_few_points_are_not_smoothed() -> None:
    values = [3.0, 1.0, 2.0]
    assert smoothed(series(values)).values.tolist() == values


def test_a_difference_is_that_of_common_steps() -> None:
    ours, first = (
        Series(np.array([1, 2, 4]), np.array([5.0, 7.0, 9.0])),
        Series(np.array([2, 3, 4]), np.array([1.0, 0, 2])),
    )
    steps, values = difference(ours, first)
    assert (steps.tolist(), values.tolist()) == ([2, 4], [6.0, 7.0])
    assert difference(Series(np.array([1]), np.array([1.0])), first) is None
