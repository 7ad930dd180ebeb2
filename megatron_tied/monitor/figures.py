"""The scalars and tables that are logged of an observed global batch, by layer, by bank, and over all layers."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import Any

import torch

from megatron_tied.monitor.agreement import agreement, chance, overlap_matrix
from megatron_tied.monitor.dead_experts import LastUse
from megatron_tied.monitor.observer import Observation
from megatron_tied.monitor.routing import RoutingSums, relative_load, routing_figures
from megatron_tied.monitor.sinks import Tables, numbered
from megatron_tied.topology import Bank, TieTopology

_DIGITS = 5


def routing_metrics(
    observation: Observation, topology: TieTopology, *, top_k: int, last_use: LastUse, step: int, window: int
) -> dict[str, float]:
    """`layer_.../NN`, `bank_.../NN`, `routing/...` and `agreement_.../NN` of one global batch.

    window: steps without a token after which an expert counts as dead.
    """
    layers = {
        layer: {
            **routing_figures(sums),
            "dead_fraction": last_use.dead_fraction(step, window, [layer]),
            "ep_busiest": observation.busiest[layer],
        }
        for layer, sums in observation.layers.items()
    }
    banks = {
        bank.index: {
            **routing_figures(bank_sums(observation, bank)),
            "dead_fraction": last_use.dead_fraction(step, window, bank.layers),
        }
        for bank in topology.banks
    }
    return {
        **_over_layers(layers),
        **{numbered(f"layer_{name}", at): value for at, of in layers.items() for name, value in of.items()},
        **{numbered(f"bank_{name}", at): value for at, of in banks.items() for name, value in of.items()},
        **_agreements(observation, topology, top_k),
    }


def bank_sums(observation: Observation, bank: Bank) -> RoutingSums:
    """The sums of all layers of a bank."""
    first, *others = (observation.layers[layer] for layer in bank.layers)
    return sum(others, start=first)


def routing_tables(observation: Observation, topology: TieTopology, top_k: int) -> Tables:
    """expert_load by layer and bank_load by bank, in multiples of the mean; agreement (overlap) of tied banks."""
    loads = {str(layer): _rounded(relative_load(sums.counts)) for layer, sums in observation.layers.items()}
    banks = {str(bank.index): _rounded(relative_load(bank_sums(observation, bank).counts)) for bank in topology.banks}
    groups = {str(bank): _rounded(overlap_matrix(sums, top_k)) for bank, sums in observation.agreements.items()}
    return {"expert_load": loads, "bank_load": banks, "agreement": groups}


def _over_layers(layers: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    def of(name: str) -> list[float]:
        return [figures[name] for figures in layers.values()]

    means = ("max_vio", "balance_loss", "token_entropy", "mean_entropy", "dead_fraction", "z_loss", "dropped")
    return {
        **{f"routing/{name}": mean(of(name)) for name in (*means, "ep_busiest")},
        "routing/max_vio_worst": max(of("max_vio")),
        "routing/max_logit": max(of("max_logit")),
        "routing/ep_busiest_worst": max(of("ep_busiest")),
    }


def _agreements(observation: Observation, topology: TieTopology, top_k: int) -> dict[str, float]:
    found = {}
    for bank, sums in observation.agreements.items():
        experts = observation.layers[topology.banks[bank].owner].num_experts
        by_chance = chance(sums.layers, top_k=top_k, experts=experts)
        for name, value in agreement(sums, top_k=top_k, experts=experts).items():
            found[numbered(f"agreement_{name}", bank)] = value
            found[numbered(f"agreement_{name}_chance", bank)] = by_chance[name]
    return found


def _rounded(tensor: torch.Tensor) -> list[Any]:
    return tensor.round(decimals=_DIGITS).tolist()
