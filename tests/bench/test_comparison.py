"""A ratio is told only where the pairs show one."""

from __future__ import annotations

import pytest

from megatron_tied.bench.comparison import Comparison


def test_each_ratio_is_of_one_round() -> None:
    found = Comparison.of([1.0, 2.0, 4.0], [1.5, 3.0, 6.0])
    # A machine that slows down fourfold slows both.
    assert found.ratios == (1.5, 1.5, 1.5)
    assert found.ratio == 1.5
    assert found.spread == 0.0


def test_the_spread_is_that_of_the_middle_half() -> None:
    found = Comparison((1.40, 1.45, 1.50, 1.55, 9.0))
    assert found.quartiles == (1.45, 1.55)
    assert found.spread == pytest.approx(0.1)
    assert found.ratio == 1.50
    assert found.told() == "1.500 (1.400 to 9.000, spread 10.0%)"


@pytest.mark.parametrize(
    "ratios",
    [
        (0.90, 0.99, 1.10, 1.20, 1.30),  # the middle half lies on both sides of 1
        (1.02, 1.03, 1.05, 1.15, 1.20),  # beyond 1, but wider than it is away from it
        (0.80, 0.84, 0.95, 0.97, 0.98),  # the same for a slower one
        (1.0, 1.0, 1.0),
        (1.5, 1.5),  # of two pairs no spread is known
    ],
)
def test_what_the_spread_hides_is_no_ratio(ratios: tuple[float, ...]) -> None:
    found = Comparison(ratios)
    assert found.ratio is None
    assert found.told().startswith("no difference that this run can show (")
    as_json = found.to_json()
    assert as_json["ratio"] is None
    assert as_json["spread"] == found.spread
    assert as_json["pairs"] == list(ratios)


def test_a_slower_one_has_a_ratio_below_one() -> None:
    found = Comparison.of([2.0, 2.0, 2.1], [1.0, 1.0, 1.0])
    assert found.ratio == pytest.approx(0.5)
    assert found.to_json()["minimum"] == pytest.approx(1 / 2.1)
    assert found.to_json()["maximum"] == pytest.approx(0.5)
