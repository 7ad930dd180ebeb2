"""Do the layers of a tie group send a token to the same experts? Three published measures, and their chance level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AgreementSums:
    """Sums over tokens for the g layers of one tie group; they add up over micro-batches and ranks.

    sums: [2 g g + 2] float64: experts in common of layers i and j, equal favourites of i and j, different experts
    that the group uses for a token, tokens.
    """

    sums: torch.Tensor
    layers: int

    @property
    def common(self) -> torch.Tensor:
        """Experts that both layers chose, summed over tokens, [g, g]."""
        return self.sums[: self.layers**2].view(self.layers, self.layers)

    @property
    def favourites(self) -> torch.Tensor:
        """Tokens for which both layers had the same favourite, [g, g]."""
        return self.sums[self.layers**2 : -2].view(self.layers, self.layers)

    def __add__(self, other: AgreementSums) -> AgreementSums:
        return AgreementSums(self.sums + other.sums, self.layers)


@torch.no_grad()
def agreement_sums(chosen: Sequence[torch.Tensor], favourites: Sequence[torch.Tensor]) -> AgreementSums:
    """The sums of one forward pass; per layer its chosen experts [tokens, experts] bool and favourites [tokens]."""
    used = chosen[0].clone()
    for other in chosen[1:]:
        used |= other
    distinct = _count(used)
    tokens = distinct.new_full((), len(used))
    common, equal = _of_pairs(torch.logical_and, chosen), _of_pairs(torch.eq, favourites)
    return AgreementSums(torch.stack([*common, *equal, distinct, tokens]), len(chosen))


def _of_pairs(
    compare: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], layers: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """How often `compare` holds, for all pairs of layers, row by row; one at a time, for the sake of memory."""
    places = range(len(layers))
    counts = {(i, j): _count(compare(layers[i], layers[j])) for i in places for j in places[i:]}
    return [counts[min(i, j), max(i, j)] for i in places for j in places]


def _count(marks: torch.Tensor) -> torch.Tensor:
    return marks.count_nonzero().double()


def overlap_matrix(sums: AgreementSums, top_k: int) -> torch.Tensor:
    """|A and B| / k of every pair of layers, mean over tokens, [g, g]; 1 on the diagonal."""
    return sums.common / (sums.sums[-1] * top_k)


def agreement(sums: AgreementSums, *, top_k: int, experts: int) -> dict[str, float]:
    """The three measures, 0 to 1, means over tokens and pairs of layers.

    top1: the layers' favourites are equal (Tying the Loop, arXiv:2606.16825). overlap: |A and B| / k of their top-k
    sets A and B (the Marin project's replication). distinct: 1 - (d - k) / (min(g k, E) - k), d the mean number of
    different experts that the group uses for a token (the code of Tying the Loop).
    """
    g, tokens = sums.layers, sums.sums[-1].item()
    first, second = torch.triu_indices(g, g, 1)
    return {
        "top1": (sums.favourites[first, second].mean() / tokens).item(),
        "overlap": overlap_matrix(sums, top_k)[first, second].mean().item(),
        "distinct": _from_distinct(sums.sums[-2].item() / tokens, g, top_k, experts),
    }


def chance(layers: int, *, top_k: int, experts: int) -> dict[str, float]:
    """What `agreement` is on average for routers that choose independently and evenly.

    top1: 1 / E. overlap: k / E. distinct: that of d = E (1 - (1 - k / E)^g), about 0.23 for 4 layers of OLMoE.
    """
    expected = experts * (1 - (1 - top_k / experts) ** layers)
    return {
        "top1": 1 / experts,
        "overlap": top_k / experts,
        "distinct": _from_distinct(expected, layers, top_k, experts),
    }


def _from_distinct(distinct: float, layers: int, top_k: int, experts: int) -> float:
    most = min(layers * top_k, experts)
    return 1 - (distinct - top_k) / (most - top_k) if most > top_k else 1.0
