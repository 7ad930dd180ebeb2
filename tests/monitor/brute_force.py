"""The figures of a global batch, token by token, from the decisions that all routers took."""

from __future__ import annotations

import math
from itertools import combinations
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import torch

Decisions = list[dict[int, list[dict[str, torch.Tensor]]]]


class Layer:
    """The decisions of one layer over all ranks and micro-batches; one row a token, in the same order in each layer."""

    def __init__(self, decisions: Decisions, layer: int, model: dict[str, Any], top_k: int):
        of_ranks = [rank[layer] for rank in decisions]
        self.logits = self._joined(of_ranks, "logits").double().numpy()
        self.probs = self._joined(of_ranks, "probs").numpy()
        self.kept = self._joined(of_ranks, "map").numpy().astype(bool)
        if model.get("moe_pad_expert_input_to_capacity"):  # the map then marks places without a token, too
            self.kept &= self.probs > 0
        self.chosen = self.kept
        if model.get("moe_expert_capacity_factor"):
            self.chosen = np.argsort(np.argsort(-self.logits, axis=1), axis=1) < top_k
            self.probs = self.logits
        self.experts = self.logits.shape[1]
        self.ranks = np.repeat(range(len(of_ranks)), [sum(len(call["map"]) for call in rank) for rank in of_ranks])
        is_sigmoid = model.get("moe_router_score_function") == "sigmoid"
        scores = 1 / (1 + np.exp(-self.logits)) if is_sigmoid else np.exp(self.logits)
        self.distribution = scores / scores.sum(1, keepdims=True)

    @staticmethod
    def _joined(of_ranks: list[list[dict[str, torch.Tensor]]], name: str) -> torch.Tensor:
        return torch.cat([call[name] for rank in of_ranks for call in rank])


def pooled(layers: list[Layer]) -> Layer:
    """One layer that has decided all that these have."""
    one = object.__new__(Layer)
    for name in ("logits", "probs", "chosen", "kept", "ranks", "distribution"):
        setattr(one, name, np.concatenate([getattr(layer, name) for layer in layers]))
    one.experts = layers[0].experts
    return one


def figures(layer: Layer, top_k: int) -> dict[str, float]:
    """All of one layer or bank but dead experts."""
    counts = [0] * layer.experts
    entropies, squares = [], []
    for token in range(len(layer.logits)):
        for expert in range(layer.experts):
            counts[expert] += bool(layer.chosen[token, expert])
        entropies.append(-sum(p * math.log(p) for p in layer.distribution[token] if p > 0))
        squares.append(math.log(sum(math.exp(logit) for logit in layer.logits[token])) ** 2)
    mean_count = fmean(counts)
    load = sorted(count / mean_count for count in counts)
    mean_distribution = [fmean(layer.distribution[:, expert]) for expert in range(layer.experts)]
    return {
        "load_min": load[0],
        "load_max": load[-1],
        "load_std": pstdev(load),
        **{f"load_p{percent}": percentile(load, percent / 100) for percent in (50, 75, 95)},
        "max_vio": max(counts) / mean_count - 1,
        "balance_loss": layer.experts
        * sum(count / sum(counts) * p for count, p in zip(counts, mean_distribution, strict=True)),
        "token_entropy": fmean(entropies) / math.log(layer.experts),
        "mean_entropy": -sum(p * math.log(p) for p in mean_distribution) / math.log(layer.experts),
        "max_logit": layer.logits.max(),
        "z_loss": fmean(squares),
        "dropped": 1 - layer.kept.sum() / (len(layer.logits) * top_k),
    }


def percentile(ordered: list[float], at: float) -> float:
    """Linear interpolation between the neighbours."""
    place = at * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def busiest(layer: Layer, ep: int) -> float:
    """Assignments of the busiest rank over the mean; neighbouring ranks form an expert parallel group."""
    world = layer.ranks.max() + 1
    received = [0] * world
    per_rank = layer.experts // ep
    for token, rank in enumerate(layer.ranks):
        for expert in np.flatnonzero(layer.kept[token]):
            received[rank // ep * ep + expert // per_rank] += 1
    return max(received) / fmean(received)


def agreement(layers: list[Layer], top_k: int) -> dict[str, float]:
    """The three measures of a tie group."""
    sets = [[set(np.flatnonzero(row)) for row in layer.chosen] for layer in layers]
    best = [
        [max(chosen, key=lambda e, row=row: row[e]) for chosen, row in zip(of, layer.probs, strict=True)]
        for of, layer in zip(sets, layers, strict=True)
    ]
    tokens, pairs = range(len(sets[0])), list(combinations(range(len(layers)), 2))
    distinct = fmean(len(set().union(*(of[token] for of in sets))) for token in tokens)
    most = min(len(layers) * top_k, layers[0].experts)
    return {
        "top1": fmean(best[i][t] == best[j][t] for i, j in pairs for t in tokens),
        "overlap": fmean(len(sets[i][t] & sets[j][t]) / top_k for i, j in pairs for t in tokens),
        "distinct": 1 - (distinct - top_k) / (most - top_k),
    }


def rows_to_other_ranks(layer: Layer, ep: int) -> int:
    """Assignments to an expert that is not on the token's rank."""
    per_rank = layer.experts // ep
    return sum(
        expert // per_rank != rank % ep
        for token, rank in enumerate(layer.ranks)
        for expert in np.flatnonzero(layer.kept[token])
    )


def bank_norm(values: dict[str, torch.Tensor], owner: int) -> float:
    """L2 norm of a bank's tensors among named ones."""
    return math.sqrt(sum(value.double().square().sum().item() for value in bank_tensors(values, owner).values()))


def bank_tensors(values: dict[str, Any], owner: int) -> dict[str, Any]:
    """Those of the routed experts of the layer `owner`."""
    return {name: value for name, value in values.items() if f"layers.{owner}.mlp.experts." in name}
