"""The figures of a router's decisions at the ends of their scales; in between, tests/distributed/test_monitoring.py."""

from __future__ import annotations

import math

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import compute_routing_scores_for_aux_loss

from megatron_tied.monitor.routing import RoutingSums, load_figures, routing_distribution, routing_figures, routing_sums


def chosen(*experts_of_token: tuple[int, ...], experts: int) -> torch.Tensor:
    routing_map = torch.zeros(len(experts_of_token), experts, dtype=torch.bool)
    for token, of in enumerate(experts_of_token):
        routing_map[token, list(of)] = True
    return routing_map


def figures_of(logits: torch.Tensor, routing_map: torch.Tensor, top_k: int) -> dict[str, float]:
    return routing_figures(routing_sums(logits, routing_map, routing_map, top_k=top_k))


def test_even_routing():
    routing_map = chosen((0, 1), (2, 3), experts=4)
    figures = figures_of(torch.zeros(2, 4), routing_map, top_k=2)
    assert figures["load_min"] == figures["load_max"] == figures["load_p50"] == 1
    assert figures["load_std"] == figures["max_vio"] == figures["dropped"] == figures["max_logit"] == 0
    assert figures["balance_loss"] == pytest.approx(1)
    assert figures["token_entropy"] == pytest.approx(1)
    assert figures["mean_entropy"] == pytest.approx(1)
    assert figures["z_loss"] == pytest.approx(math.log(4) ** 2)


def test_collapse_on_one_expert():
    logits = torch.zeros(8, 4)
    logits[:, 2] = 100.0
    figures = figures_of(logits, chosen(*[(2,)] * 8, experts=4), top_k=1)
    assert (figures["load_max"], figures["load_min"], figures["max_vio"], figures["max_logit"]) == (4, 0, 3, 100)
    assert figures["balance_loss"] == pytest.approx(4)
    assert figures["token_entropy"] == pytest.approx(0, abs=1e-12)
    assert figures["mean_entropy"] == pytest.approx(0, abs=1e-12)


def test_sure_tokens_that_spread_evenly_have_low_token_entropy_and_high_mean_entropy():
    logits = 100.0 * torch.eye(4)
    figures = figures_of(logits, chosen((0,), (1,), (2,), (3,), experts=4), top_k=1)
    assert figures["token_entropy"] == pytest.approx(0, abs=1e-12)
    assert figures["mean_entropy"] == pytest.approx(1)


def test_load_in_multiples_of_the_mean():
    figures = load_figures(torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=torch.float64))
    assert figures == {
        "load_min": 0,
        "load_max": 2.5,
        "load_std": pytest.approx(math.sqrt(((0 - 2) ** 2 + (1 - 2) ** 2 + (5 - 2) ** 2) / 4) / 2),
        "load_p50": 0.75,
        "load_p75": pytest.approx(1 + 0.25 * 1.5),
        "load_p95": pytest.approx(1 + 0.85 * 1.5),
        "max_vio": 1.5,
    }


def test_what_is_dropped_does_not_change_what_was_chosen():
    wanted = chosen((0, 1), (0, 1), (0, 2), experts=4)
    kept = chosen((0, 1), (), (2,), experts=4)
    whole, cut = (routing_figures(routing_sums(torch.zeros(3, 4), wanted, of, top_k=2)) for of in (wanted, kept))
    assert (whole.pop("dropped"), cut.pop("dropped")) == (0, 0.5)
    assert cut == whole
    assert cut["load_max"] == 2


def test_one_expert_has_no_entropy():
    figures = figures_of(torch.ones(3, 1), chosen((0,), (0,), (0,), experts=1), top_k=1)
    assert (figures["token_entropy"], figures["mean_entropy"], figures["max_vio"]) == (0, 0, 0)


def test_sums_of_parts_are_those_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 8, generator=generator)
    routing_map = torch.zeros(64, 8, dtype=torch.bool).scatter(1, logits.topk(2).indices, True)
    whole = routing_sums(logits, routing_map, routing_map, top_k=2)
    halves = [
        routing_sums(logits[half], routing_map[half], routing_map[half], top_k=2)
        for half in (slice(0, 20), slice(20, 64))
    ]
    both: RoutingSums = halves[0] + halves[1]
    assert routing_figures(both) == pytest.approx(routing_figures(whole), rel=1e-12)


def test_half_precision_logits_are_counted_in_float32():
    logits = torch.randn(4096, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    routing_map = torch.ones(4096, 8, dtype=torch.bool)
    half, full = (figures_of(of, routing_map, top_k=8) for of in (logits, logits.float()))
    assert half == full


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_the_distribution_is_the_one_that_the_load_balancing_loss_takes(score_function: str):
    logits = torch.randn(16, 8, generator=torch.Generator().manual_seed(2))
    _, scores = compute_routing_scores_for_aux_loss(logits, 2, score_function)
    torch.testing.assert_close(routing_distribution(logits, 2, score_function), scores)
