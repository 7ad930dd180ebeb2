"""Agreement of the layers of a tie group: its ends, its chance level, and one group by hand."""

from __future__ import annotations

import pytest
import torch

from megatron_tied.monitor.agreement import agreement, agreement_sums, chance, overlap_matrix


def random_group(layers: int, tokens: int, experts: int, top_k: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    maps, favourites = [], []
    for _ in range(layers):
        probs = torch.rand(tokens, experts, generator=generator)
        routing_map = torch.zeros(tokens, experts, dtype=torch.bool).scatter(1, probs.topk(top_k).indices, True)
        maps.append(routing_map)
        favourites.append(probs.argmax(1))
    return maps, favourites


def test_layers_that_route_alike_agree_wholly():
    maps, favourites = random_group(1, 50, 16, 4)
    sums = agreement_sums(maps * 3, favourites * 3)
    assert agreement(sums, top_k=4, experts=16) == {"top1": 1, "overlap": 1, "distinct": 1}
    assert torch.equal(overlap_matrix(sums, 4), torch.ones(3, 3, dtype=torch.float64))


def test_layers_that_share_no_expert_do_not_agree():
    first, second = torch.zeros(2, 10, 8, dtype=torch.bool)
    first[:, :2], second[:, 4:6] = True, True
    sums = agreement_sums([first, second], [torch.zeros(10), torch.full((10,), 4.0)])
    assert agreement(sums, top_k=2, experts=8) == {"top1": 0, "overlap": 0, "distinct": 0}


def test_two_layers_by_hand():
    # Tokens choose {0, 1} and {0, 1}, {0, 1} and {1, 2}: 1 and 1/2 in common; 2 and 3 different ones of 2 to 4.
    first = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    second = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0]], dtype=torch.bool)
    sums = agreement_sums([first, second], [torch.tensor([0, 1]), torch.tensor([1, 1])])
    assert agreement(sums, top_k=2, experts=4) == {"top1": 0.5, "overlap": 0.75, "distinct": 0.75}
    assert overlap_matrix(sums, 2).tolist() == [[1, 0.75], [0.75, 1]]


@pytest.mark.parametrize(("layers", "experts", "top_k"), [(2, 16, 4), (4, 64, 8), (5, 8, 2)])
def test_chance_is_what_independent_even_routers_come_to(layers: int, experts: int, top_k: int):
    sums = agreement_sums(*random_group(layers, 20000, experts, top_k))
    found = agreement(sums, top_k=top_k, experts=experts)
    assert found == pytest.approx(chance(layers, top_k=top_k, experts=experts), abs=0.01)


def test_published_chance_level_of_olmoe():
    assert chance(4, top_k=8, experts=64)["distinct"] == pytest.approx(0.23, abs=0.005)


def test_routers_that_take_all_experts_always_agree():
    assert chance(3, top_k=4, experts=4) == {"top1": 0.25, "overlap": 1, "distinct": 1}
    maps, favourites = random_group(3, 10, 4, 4)
    assert agreement(agreement_sums(maps, favourites), top_k=4, experts=4)["distinct"] == 1
