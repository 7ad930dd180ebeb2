"""Watches the routers of a model: the decisions of one global batch, each forward pass once, summed over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter

from megatron_tied.layers.moe_layer import TiedMoELayer, tied_layers
from megatron_tied.monitor.agreement import AgreementSums, agreement_sums
from megatron_tied.monitor.routing import RoutingSums, routing_sums


@dataclass(frozen=True)
class Observation:
    """The routing of one global batch, the same on every rank, in host memory.

    layers: by decoder layer. agreements: by tied bank. busiest: by layer, tokens (assignments) of the expert parallel
    rank that had most of them, over the mean of all ranks.
    """

    layers: dict[int, RoutingSums]
    agreements: dict[int, AgreementSums]
    busiest: dict[int, float]


class RoutingObserver:
    """Notes what the routers of `model` decide while `observing`, and nothing else.

    Recompute runs a layer a second time in backward: only forward passes under `observing` count.
    """

    def __init__(self, model: torch.nn.Module):
        self._is_observing = False
        self._sums: dict[int, RoutingSums] = {}
        self._agreements: dict[int, AgreementSums] = {}
        self._waiting: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for layer in tied_layers(model):
            # Megatron-Core has no hook between a router's logits and its decisions.
            layer.router.routing = partial(self._route, layer, layer.router.routing)

    @contextmanager
    def observing(self) -> Iterator[None]:
        """A forward pass of the model in this context counts."""
        self._is_observing = True
        try:
            yield
        finally:
            self._is_observing = False
            self._waiting.clear()

    def _route(
        self, layer: TiedMoELayer, routing: Callable[..., Any], logits: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        decided = routing(logits, *args, **kwargs)
        if self._is_observing:
            self._note(layer, logits.detach(), *(tensor.detach() for tensor in decided[:2]))
        return decided

    def _note(self, layer: TiedMoELayer, logits: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor) -> None:
        config, index = layer.config, layer.layer_index
        logits = logits.flatten(0, -2)
        kept = routing_map
        if config.moe_pad_expert_input_to_capacity:
            # The map then marks places that no token fills, too.
            kept = routing_map & (probs != 0)
        if config.moe_expert_capacity_factor is not None:
            probs, routing_map = _before_dropping(layer.router, logits)
        sums = routing_sums(
            logits,
            routing_map,
            kept,
            top_k=config.moe_router_topk,
            score_function=config.moe_router_score_function,
        )
        self._sums[index] = self._sums[index] + sums if index in self._sums else sums
        bank = layer.bank
        if bank.is_tied:
            waiting = self._waiting.setdefault(bank.index, [])
            waiting.append((routing_map, probs.masked_fill(~routing_map, -1.0).argmax(-1)))
            if len(waiting) == bank.size:
                self._compare(bank.index)

    def _compare(self, bank: int) -> None:
        maps, favourites = zip(*self._waiting.pop(bank), strict=True)
        sums = agreement_sums(maps, favourites)
        self._agreements[bank] = self._agreements[bank] + sums if bank in self._agreements else sums

    @torch.no_grad()
    def take(self) -> Observation:
        """What was noted since the last call, over the global batch; a collective."""
        layers, banks = self._sums, self._agreements
        self._sums, self._agreements = {}, {}
        received = _received(layers)
        parts = [*(sums.sums for sums in layers.values()), *(sums.sums for sums in banks.values()), received]
        largest = torch.stack([*(sums.max_logit.double() for sums in layers.values()), *received])
        # Sequence parallel routers see different tokens, too.
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        total = torch.cat(parts)
        torch.distributed.all_reduce(total, group=group)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
        *totals, received = torch.split(total.cpu(), [part.numel() for part in parts])
        max_logits, most = torch.split(largest.cpu(), len(layers))
        return Observation(
            layers={
                layer: RoutingSums(sums, max_logit)
                for layer, sums, max_logit in zip(layers, totals[: len(layers)], max_logits, strict=True)
            },
            agreements={
                bank: AgreementSums(sums, banks[bank].layers)
                for bank, sums in zip(banks, totals[len(layers) :], strict=True)
            },
            busiest=dict(zip(layers, (most * group.size() / received.clamp(min=1)).tolist(), strict=True)),
        )


def _before_dropping(router: TopKRouter, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A router's probabilities and choices [tokens, experts] before capacity takes some: those it drops are its own."""
    config = router.config
    decided: tuple[torch.Tensor, torch.Tensor] = topk_routing_with_score_function(
        logits,
        router.topk,
        use_pre_softmax=config.moe_router_pre_softmax,
        num_groups=config.moe_router_num_groups,
        group_topk=config.moe_router_group_topk,
        scaling_factor=config.moe_router_topk_scaling_factor,
        score_function=router.score_function,
        expert_bias=router.expert_bias,
    )
    return decided


def _received(layers: Mapping[int, RoutingSums]) -> torch.Tensor:
    """The assignments that this rank's experts got in each layer, from all ranks of its expert parallel group."""
    counts = torch.cat([sums.kept for sums in layers.values()])
    group = parallel_state.get_expert_model_parallel_group()
    torch.distributed.all_reduce(counts, group=group)
    by_layer = torch.split(counts, [sums.num_experts for sums in layers.values()])
    return torch.stack([part.chunk(group.size())[group.rank()].sum() for part in by_layer])
