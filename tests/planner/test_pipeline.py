"""Where pipelines are cut, against every possible cut."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_tied.planner.pipeline import (
    aligned_cut,
    boundaries,
    chunks_of,
    even_cut,
    layout_argument,
    straddling,
)
from megatron_tied.topology import TieConfig, TieTopology


def topology(banks: list[int]) -> TieTopology:
    return TieTopology.build(TieConfig(banks=banks), len(banks))


def every_cut(layers: int, chunks: int) -> list[tuple[int, ...]]:
    """All ways to cut into chunks of at least one layer."""
    places = [(0, *inner, layers) for inner in combinations(range(1, layers), chunks - 1)]
    return [tuple(end - start for start, end in pairwise(ends)) for ends in places]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.integers(1, 5))
def test_the_aligned_cut_is_the_best_of_all_that_part_no_group(banks: list[int], chunks: int) -> None:
    tied = topology(banks)
    allowed = [
        cut
        for cut in every_cut(len(banks), chunks)
        if all(len({sum(layer >= end for end in _ends(cut)) for layer in bank.layers}) == 1 for bank in tied.banks)
    ]
    found = aligned_cut(tied, chunks)
    if not allowed:
        assert found is None
    else:
        assert found in allowed
        assert max(found) == min(max(cut) for cut in allowed)


def _ends(cut: tuple[int, ...]) -> list[int]:
    return [sum(cut[: index + 1]) for index in range(len(cut))]


def test_which_banks_a_cut_parts() -> None:
    tied = topology([0, 1, 1, 2, 2, 2, 3, 3])
    assert straddling(tied, (3, 3, 2)) == []
    assert [bank.layers for bank in straddling(tied, (2, 2, 2, 2))] == [(1, 2), (3, 4, 5)]
    assert chunks_of(tied.banks[2], (2, 2, 2, 2)) == [1, 2]


def test_a_cut_may_have_groups_between_the_layers_of_another() -> None:
    # Block-cyclic: layers 1 and 3 share a bank, 2 and 4 another; only the ends are free.
    assert aligned_cut(topology([0, 1, 2, 1, 2, 3]), 3) == (1, 4, 1)
    assert aligned_cut(topology([0, 1, 2, 1, 2, 3]), 4) is None


def test_of_equally_good_cuts_the_first_stage_gets_the_fewest_layers() -> None:
    assert aligned_cut(topology([0, 1, 2, 2, 3, 4]), 2) == (2, 4)


def test_even_cuts_are_megatrons_own() -> None:
    assert even_cut(8, 4) == (2, 2, 2, 2)
    assert even_cut(7, 2) is None


@pytest.mark.parametrize(
    ("cut", "mtp", "argument", "words"),
    [
        ((3, 4, 1), 0, "Et*3|t*4|tL", "layers 0-2 | 3-6 | 7"),
        ((1, 2), 2, "Et|t*2mmL", "layers 0 | 1-2"),
        ((5,), 0, "Et*5L", "layers 0-4"),
    ],
)
def test_words_for_a_cut(cut: tuple[int, ...], mtp: int, argument: str, words: str) -> None:
    assert layout_argument(cut, mtp) == argument
    assert boundaries(cut) == words
