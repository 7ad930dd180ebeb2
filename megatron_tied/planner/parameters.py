"""How many parameters a model has, by formula: no model is built, no torch imported."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.models.config import ModelConfig
from megatron_tied.planner.tensors import bank_tensors, model_tensors
from megatron_tied.topology import TieTopology

# Megatron-Core options that add or replace parameters in ways the formulas below do not know.
_NOT_COUNTED = (
    "mtp_num_layers",
    "moe_latent_size",
    "attention_output_gate",
    "experimental_attention_variant",
)


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of the whole model over all ranks, each counted once where it is stored.

    bank_experts: the routed experts of each bank, in the order of `TieTopology.banks`.
    untied_routed_experts: the routed experts if every layer had a copy of its bank, at the same width.
    shared_again: of attention and routers that layers share, those that all but the first would have of their own.
    active_routed_experts: those one token passes through; a tied bank is passed once per layer that uses it.
    """

    embedding: int
    output: int
    attention: int
    norms: int
    router: int
    dense_mlp: int
    shared_experts: int
    bank_experts: tuple[int, ...]
    untied_routed_experts: int
    active_routed_experts: int
    shared_again: int = 0

    @property
    def routed_experts(self) -> int:
        """The routed experts of all banks."""
        return sum(self.bank_experts)

    @property
    def total(self) -> int:
        """All parameters of the tied model."""
        return self._unrouted + self.routed_experts

    @property
    def untied(self) -> int:
        """All parameters if every layer had a copy of its bank: what one would store without tying."""
        return self._unrouted + self.shared_again + self.untied_routed_experts

    @property
    def active(self) -> int:
        """The parameters at work on one token, the whole embedding and output matrices included."""
        return self._unrouted + self.shared_again + self.active_routed_experts

    @property
    def _unrouted(self) -> int:
        attention_and_ends = self.embedding + self.output + self.attention + self.norms
        return attention_and_ends + self.router + self.dense_mlp + self.shared_experts


def count_parameters(model: ModelConfig, topology: TieTopology, vocab_size: int | None = None) -> ParameterCount:
    """Counts the parameters of `model` with the expert banks of `topology`.

    `vocab_size` (default: the model's) is the number of rows of the embedding, padding included. Raises
    ConfigError if none is given, for options whose parameters are not known here, and for a topology that was
    made for other layers.
    """
    vocab_size = known_vocabulary(model, vocab_size)
    _check(model, topology)
    found: Counter[str] = Counter()
    banks: Counter[int] = Counter()
    shared_again = 0
    for tensor in model_tensors(model, topology, vocab_size):
        found[tensor.kind] += tensor.numel * tensor.copies
        if tensor.expert_bank is not None:
            banks[tensor.expert_bank] += tensor.numel * tensor.copies
        elif tensor.bank is not None:
            shared_again += tensor.numel * (topology.banks[tensor.bank].size - 1)
    base = model.num_moe_experts
    per_expert = sum(tensor.numel for tensor in bank_tensors(model, topology.banks[0], 1)) if topology.banks else 0
    return ParameterCount(
        embedding=found["embedding"],
        output=found["output"],
        attention=found["attention"],
        norms=found["norms"],
        router=found["router"],
        dense_mlp=found["dense_mlp"],
        shared_experts=found["shared_experts"],
        bank_experts=tuple(banks[bank.index] for bank in topology.banks),
        untied_routed_experts=per_expert * sum(topology.num_experts(layer, base) for layer in topology.moe_layers),
        active_routed_experts=per_expert * model.moe_router_topk * len(topology.moe_layers),
        shared_again=shared_again,
    )


def known_vocabulary(model: ModelConfig, vocab_size: int | None) -> int:
    """`vocab_size`, or else what the model says. Raises ConfigError if neither is given."""
    known = model.vocab_size if vocab_size is None else vocab_size
    if known is None:
        raise ConfigError(Problem("model.vocab_size", None, "must be given to count parameters"))
    return known


def _check(model: ModelConfig, topology: TieTopology) -> None:
    """Raise ConfigError unless the parameters of `model` under `topology` can be counted."""
    extra = model.model_extra or {}
    problems = [
        Problem(f"model.{name}", extra[name], "must be left out: its parameters cannot be counted yet")
        for name in _NOT_COUNTED
        if extra.get(name)
    ]
    if (topology.num_layers, topology.moe_layers) != (model.num_layers, model.moe_layers()):
        valid = f"must be laid out for {model.num_layers} layers, MoE in {list(model.moe_layers())}"
        problems.append(Problem("topology", topology.describe(), valid))
    if problems:
        raise ConfigError(problems)
