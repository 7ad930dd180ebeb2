"""Where a pipeline may be cut: the decoder layers of each model chunk, and the tie groups they hold.

A cut is the list of the chunks' numbers of layers, in the order in which a token passes them: with interleaving
(virtual pipeline stages), chunk i lies on stage i modulo the number of stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from megatron_tied.topology import Bank, TieTopology


def chunks_of(bank: Bank, cut: Sequence[int]) -> list[int]:
    """The chunks that hold layers of `bank`, in order."""
    ends = list(accumulate(cut))
    return sorted({next(chunk for chunk, end in enumerate(ends) if layer < end) for layer in bank.layers})


def straddling(topology: TieTopology, cut: Sequence[int]) -> list[Bank]:
    """The banks that layers of several chunks use."""
    return [bank for bank in topology.banks if len(chunks_of(bank, cut)) > 1]


def even_cut(num_layers: int, chunks: int) -> tuple[int, ...] | None:
    """Megatron-LM's own cut, or None where the layers do not divide."""
    return None if num_layers % chunks else (num_layers // chunks,) * chunks


def aligned_cut(topology: TieTopology, chunks: int) -> tuple[int, ...] | None:
    """The cut between tie groups whose largest chunk is smallest, or None where there are too few places to cut.

    Of equally good ones, that with the largest chunks last, since the first stage also keeps the embedding and holds
    the activations of the most micro-batches.
    """
    places = [0, *_places(topology), topology.num_layers]
    if len(places) <= chunks:
        return None
    # best[i]: the best way to cut the layers before places[i], as (largest chunk, chunks); one more chunk each round.
    best: list[tuple[int, tuple[int, ...]] | None] = [(0, ()), *[None] * (len(places) - 1)]
    for _ in range(chunks):
        best = [_last_chunk(places, best, end) for end in range(len(places))]
    found = best[-1]
    return None if found is None else found[1]


def _places(topology: TieTopology) -> list[int]:
    """Every layer before which a cut parts no tie group."""
    inside = {layer for bank in topology.banks for layer in range(bank.layers[0] + 1, bank.layers[-1] + 1)}
    return [layer for layer in range(1, topology.num_layers) if layer not in inside]


def _last_chunk(
    places: Sequence[int], best: Sequence[tuple[int, tuple[int, ...]] | None], end: int
) -> tuple[int, tuple[int, ...]] | None:
    ways = [
        (max(before[0], size := places[end] - places[start]), (*before[1], size))
        for start, before in enumerate(best[:end])
        if before is not None
    ]
    return min(ways, default=None)


def layout_argument(cut: Sequence[int], mtp_layers: int = 0) -> str:
    """A cut in the words of `--pipeline-model-parallel-layout`, such as `Et*3|t*4|t*4|t*3L`."""
    stages = ["t" if size == 1 else f"t*{size}" for size in cut]
    stages[0] = f"E{stages[0]}"
    stages[-1] += "m" * mtp_layers + "L"
    return "|".join(stages)


def boundaries(cut: Sequence[int]) -> str:
    """A cut for people: `layers 0-3 | 4-7`."""
    ends = [0, *accumulate(cut)]
    ranges = (str(first) if end - first == 1 else f"{first}-{end - 1}" for first, end in pairwise(ends))
    return f"layers {' | '.join(ranges)}"
