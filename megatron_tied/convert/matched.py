"""Tying by what experts do: `convert --tie-method matched`, which gives the untied model text and looks at its routers.

The experts of a tie group's layers, and their routers' rows, change places so that those which do alike meet; a bank
then gets, for each place, one expert that does nearly what all of them do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors import safe_open

from megatron_tied.convert.calibration import calibration_tokens
from megatron_tied.convert.live_model import Routed, model_of_one_bank, routed
from megatron_tied.convert.matching import (
    Matrices,
    Samples,
    assigned,
    matching_costs,
    merged_expert,
    samples_of,
)
from megatron_tied.convert.memory import experts_of, outside_experts, shortage
from megatron_tied.convert.retied import merged_dtype, merges
from megatron_tied.convert.shards import save
from megatron_tied.convert.sources import WeightSource
from megatron_tied.convert.tensors import KINDS, count, expert_shape
from megatron_tied.errors import ConfigError, Problem
from megatron_tied.inference.processes import one_process
from megatron_tied.platform import device
from megatron_tied.topology import Bank, TieTopology

TOKENS = 8192
_LONGEST = 512
# Over all experts of a layer: states that are kept until its tie group is complete, and those that are compared by.
_KEPT = 32_768
_COMPARED = 8192


@dataclass(frozen=True)
class MatchedMerge:
    """A `Merge` that `match` has found. `orders` has the layers whose experts change places; banks lie in `scratch`."""

    orders: dict[int, torch.Tensor]
    scratch: Path

    def permutation(self, layer: int) -> torch.Tensor | None:
        """See `Merge`."""
        return self.orders.get(layer)

    def experts(self, base: WeightSource, bank: Bank, kind: str) -> torch.Tensor:
        """See `Merge`."""
        with safe_open(_file(self.scratch, bank), framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(kind)
        return tensor


def match(
    source: WeightSource,
    topology: TieTopology,
    calibration: Path,
    scratch: Path,
    *,
    tokens: int | None = None,
    longest: int | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> MatchedMerge:
    """Match and merge the experts of the tie groups of `topology` on `tokens` (`TOKENS`) of the data set `calibration`.

    `longest` is the longest sequence that the model is for. Memory holds what is no expert, the experts of a tie group,
    those of one layer in float32, and states of all tokens for two layers and of some for each layer of a group; merged
    banks go to the directory `scratch`. `say` is given a line for each layer. Raises `ConfigError` for data that does
    not fit the model, for weights that are not finite, and where there is less memory.
    """
    length = min(_LONGEST, longest or _LONGEST)
    text = calibration_tokens(calibration, tokens=tokens or TOKENS, length=length, vocab_size=source.vocab_size)
    if lacking := shortage(_needed_memory(source, topology, text.numel())):
        valid = f"{lacking}: take a smaller --tie-group-size or fewer --calibration-tokens, or another method"
        raise ConfigError(Problem("--tie-method", "matched", valid))
    matcher = _Matcher(source, topology, scratch, say)
    merged = {layer for bank in topology.banks if merges(source, bank) for layer in bank.layers}
    with one_process(), torch.no_grad():
        for decided in routed(model_of_one_bank(source), source, text, merged):
            matcher.take(decided)
    return MatchedMerge(matcher.orders, scratch)


def _needed_memory(source: WeightSource, topology: TieTopology, tokens: int) -> int:
    state = 4 * source.config.hidden_size
    groups = [bank for bank in topology.banks if merges(source, bank)]
    return (
        outside_experts(source)
        + max(experts_of(source, layer) for layer in topology.moe_layers)
        + max((_bank_bytes(source, bank, bank.size + 1) for bank in groups), default=0)
        # Between layers, given to a router, and once more while they are put together.
        + 3 * tokens * state
        + max((bank.size for bank in groups), default=0) * min(tokens, _KEPT) * state
    )


def _bank_bytes(source: WeightSource, bank: Bank, copies: int = 1) -> int:
    return copies * sum(
        count(expert_shape(source.config, source.topology, bank.owner, kind))
        * merged_dtype(source, bank, kind).itemsize
        for kind in KINDS
    )


def scratch_bytes(source: WeightSource, topology: TieTopology) -> int:
    """What `match` will write to its directory."""
    return sum(_bank_bytes(source, bank) for bank in topology.banks if merges(source, bank))


class _Matcher:
    """Keeps samples of what layers get, and merges a tie group after its last layer."""

    def __init__(self, source: WeightSource, topology: TieTopology, scratch: Path, say: Callable[[str], object]):
        self.orders: dict[int, torch.Tensor] = {}
        self._source = source
        self._topology = topology
        self._scratch = scratch
        self._say = say
        self._generator = torch.Generator().manual_seed(0)
        self._samples: dict[int, Samples] = {}

    def take(self, decided: Routed) -> None:
        """The next layer of those that are merged."""
        layer = decided.layer
        bank = self._topology.bank(layer.layer_index)
        limit = max(1, _KEPT // layer.config.num_moe_experts)
        self._samples[layer.layer_index] = samples_of(*decided[1:], limit, self._generator)
        if self._samples.keys() >= set(bank.layers):
            self._merge(bank, layer.config)

    def _merge(self, bank: Bank, config: TransformerConfig) -> None:
        experts = {layer: _experts(self._source, layer) for layer in bank.layers}
        samples = {layer: self._samples.pop(layer) for layer in bank.layers}
        for layer in bank.layers[1:]:
            order = self._order(layer, bank.owner, experts, samples[layer], config)
            experts[layer] = [experts[layer][expert] for expert in order]
            samples[layer] = samples[layer].moved(order)
        merged = {
            kind: torch.empty(
                expert_shape(self._source.config, self._source.topology, bank.owner, kind),
                dtype=merged_dtype(self._source, bank, kind),
            )
            for kind in KINDS
        }
        for place in range(config.num_moe_experts):
            meeting = [experts[layer][place] for layer in bank.layers]
            sent = [samples[layer][place] for layer in bank.layers]
            expert = merged_expert(meeting, sent, config.activation_func)
            for kind in KINDS:
                merged[kind][place] = expert[kind]
        save(merged, _file(self._scratch, bank))

    def _order(
        self,
        layer: int,
        owner: int,
        experts: dict[int, list[Matrices]],
        samples: Samples,
        config: TransformerConfig,
    ) -> list[int]:
        """Which expert of `layer` comes to each place."""
        limit = max(1, _COMPARED // len(samples))
        compared = [sample.first(limit) for sample in samples]
        costs = matching_costs(experts[layer], experts[owner], compared, config.activation_func)
        if not costs.isfinite().all():
            raise ConfigError(Problem("--input", None, f"computes numbers that are not finite in layer {layer}"))
        order = assigned(costs, config.moe_router_num_groups or 1)
        places = torch.arange(len(order))
        moved = int((order != places).sum())
        if moved:
            self.orders[layer] = order
        told = f"{costs.diagonal().mean():.3f} in their places, {costs[order, places].mean():.3f} when {moved} move"
        self._say(f"layer {layer}: distance of experts from those of layer {owner}: {told}")
        return order.tolist()


def _experts(source: WeightSource, layer: int) -> list[Matrices]:
    stacked = {kind: source.read_experts(layer, kind).to(device()) for kind in KINDS}
    return [{kind: stacked[kind][expert] for kind in KINDS} for expert in range(len(stacked["gate"]))]


def _file(scratch: Path, bank: Bank) -> Path:
    return scratch / f"bank_{bank.index}.safetensors"
