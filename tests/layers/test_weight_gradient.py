"""Weight gradients of use sites against a loop over experts."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_tied.layers.grouped_product import BLOCK
from megatron_tied.layers.weight_gradient import Site, add_gradient_of, concatenated, gradient_of, gradient_of_all
from megatron_tied.topology import FUSED_BELOW, TieConfig, TieTopology

EXPERTS, WIDTH, OUT = 4, 16, 24
# Tokens of each expert, by use site: experts without any, and a site without any.
COUNTS = ([3, 0, 5, 1], [0, 0, 0, 9], [2, 2, 2, 2], [0, 0, 0, 0], [7, 1, 0, 0], [BLOCK, 0, 3, 2 * BLOCK + 1])


def sites(dtype: torch.dtype = torch.float32) -> list[Site]:
    generator = torch.Generator().manual_seed(0)
    return [
        Site(
            torch.randn(sum(counts), WIDTH, generator=generator).to(dtype),
            torch.randn(sum(counts), OUT, generator=generator).to(dtype),
            torch.tensor(counts).cumsum(0).to(torch.int32),
        )
        for counts in COUNTS
    ]


def by_loop(site: Site) -> torch.Tensor:
    """One expert after the other, in float64."""
    starts = [0, *site.offsets.tolist()]
    parts = [
        site.output_gradients[start:end].double().T @ site.inputs[start:end].double()
        for start, end in itertools.pairwise(starts)
    ]
    return torch.stack(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_of_one_of_another_and_of_all(dtype: torch.dtype) -> None:
    expected = sum(by_loop(site) for site in sites(dtype))
    # Of an expert's gradient, relative: a few roundings to the dtype.
    limit = 4 * torch.finfo(dtype).eps
    first, *others = sites(dtype)
    total = gradient_of(first)
    for other in others:
        add_gradient_of(other, total)
    for found in (total, gradient_of_all(sites(dtype)), gradient_of(concatenated(sites(dtype)))):
        assert found.dtype == dtype
        assert found.shape == (EXPERTS, OUT, WIDTH)
        errors = (found.double() - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))
        assert errors.max() < limit


def test_tokens_that_are_put_together_stay_sorted_by_expert_and_site() -> None:
    for index, some in enumerate(numbered := sites()):
        some.inputs[:] = index
        starts = [0, *some.offsets.tolist()]
        for expert, (start, end) in enumerate(itertools.pairwise(starts)):
            some.output_gradients[start:end] = expert
    together = concatenated(numbered)
    assert together.offsets.tolist() == torch.tensor(COUNTS).sum(0).cumsum(0).tolist()
    pairs = torch.stack([together.output_gradients[:, 0], together.inputs[:, 0]], dim=1).tolist()
    assert pairs == sorted(pairs)


def test_what_is_fused() -> None:
    def fuses(how: str, tokens: float, layer: int = 2) -> bool:
        topology = TieTopology.build(TieConfig(group_size=2, weight_gradient=how), 6)
        return topology.fuses_weight_gradient(topology.bank(layer), tokens)

    assert [fuses("auto", tokens) for tokens in (0, FUSED_BELOW - 1, FUSED_BELOW)] == [True, True, False]
    assert fuses("fused", 10**6)
    assert not fuses("immediate", 1)
    assert not any(fuses(how, 1, layer=0) for how in ("auto", "fused"))
