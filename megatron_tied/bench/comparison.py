"""What pairs of times say about two contenders, and whether they say anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from megatron_tied.bench.results import Pairs

# Of fewer pairs no spread is known.
_FEWEST_PAIRS = 3


@dataclass(frozen=True)
class Comparison:
    """How many times as fast the first contender is as the second, in each round."""

    ratios: tuple[float, ...]

    @classmethod
    def of(cls, first: Sequence[float], second: Sequence[float]) -> Comparison:
        """From seconds a step of both, round by round; a machine that slows down slows both of a round."""
        return cls(tuple(slow / fast for fast, slow in zip(first, second, strict=True)))

    @property
    def quartiles(self) -> tuple[float, float] | None:
        """Between them lies the middle half of the ratios; None of too few to say."""
        if len(self.ratios) < _FEWEST_PAIRS:
            return None
        lower, _, upper = quantiles(self.ratios, n=4, method="inclusive")
        return lower, upper

    @property
    def spread(self) -> float | None:
        """The distance between the quartiles."""
        return self.quartiles[1] - self.quartiles[0] if self.quartiles else None

    @property
    def ratio(self) -> float | None:
        """The median; None if the quartiles lie on both sides of 1, or further apart than the median is from 1."""
        if self.quartiles is None:
            return None
        lower, upper = self.quartiles
        middle = median(self.ratios)
        if lower <= 1 <= upper or upper - lower > abs(middle - 1):
            return None
        return middle

    def told(self) -> str:
        """For people: the ratio, or that there is none."""
        if self.quartiles is None:
            return f"no difference that this run can show (fewer than {_FEWEST_PAIRS} rounds)"
        if self.ratio is None:
            return f"no difference that this run can show (spread {self.spread:.1%})"
        return f"{self.ratio:.3f} ({min(self.ratios):.3f} to {max(self.ratios):.3f}, spread {self.spread:.1%})"

    def to_json(self) -> Pairs:
        """All of it."""
        return {
            "ratio": self.ratio,
            "spread": self.spread,
            "minimum": min(self.ratios),
            "maximum": max(self.ratios),
            "pairs": list(self.ratios),
            "told": self.told(),
        }
