"""How many parameters a model has, by formula: no model is built, no torch imported."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.models.config import ModelConfig
from megatron_tied.topology import TieTopology

# Megatron-Core options that add or replace parameters in ways the formulas below do not know.
_NOT_COUNTED = (
    "multi_latent_attention",
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
        return self._unrouted + self.untied_routed_experts

    @property
    def active(self) -> int:
        """The parameters at work on one token, the whole embedding and output matrices included."""
        return self._unrouted + self.active_routed_experts

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
    vocab_size = model.vocab_size if vocab_size is None else vocab_size
    _check(model, topology, vocab_size)

    layers, hidden, base = model.num_layers, model.hidden_size, model.num_moe_experts
    moe_layers = len(topology.moe_layers)
    embedding = vocab_size * hidden
    expert = _mlp(model, model.moe_ffn_hidden_size)
    # Summed over layers: the routers' rows, and the experts there would be without tying.
    layer_experts = sum(topology.num_experts(layer, base) for layer in topology.moe_layers)
    return ParameterCount(
        embedding=embedding,
        output=0 if model.share_embeddings_and_output_weights else embedding,
        attention=layers * _attention(model),
        norms=(2 * layers + 1) * _norm(model, hidden) + layers * _qk_norms(model),
        router=layer_experts * (hidden + model.add_bias_linear),
        dense_mlp=(layers - moe_layers) * _mlp(model, model.ffn_hidden_size),
        shared_experts=moe_layers * _shared_expert(model),
        bank_experts=tuple(expert * topology.num_experts(bank, base) for bank in topology.banks),
        untied_routed_experts=expert * layer_experts,
        active_routed_experts=expert * model.moe_router_topk * moe_layers,
    )


def _check(model: ModelConfig, topology: TieTopology, vocab_size: int | None) -> None:
    extra = model.model_extra or {}
    problems = [
        Problem(f"model.{name}", extra[name], "must be left out: its parameters cannot be counted yet")
        for name in _NOT_COUNTED
        if extra.get(name)
    ]
    if vocab_size is None:
        problems.append(Problem("model.vocab_size", None, "must be given to count parameters"))
    if (topology.num_layers, topology.moe_layers) != (model.num_layers, model.moe_layers()):
        valid = f"must be laid out for {model.num_layers} layers, MoE in {list(model.moe_layers())}"
        problems.append(Problem("topology", topology.describe(), valid))
    if problems:
        raise ConfigError(problems)


def _norm(model: ModelConfig, width: int) -> int:
    return width if model.normalization == "RMSNorm" else 2 * width


def _qk_norms(model: ModelConfig) -> int:
    if not model.qk_layernorm:
        return 0
    heads = model.num_attention_heads + model.num_query_groups if model.qk_norm_scope == "projection" else 2
    return _norm(model, heads * model.kv_channels)


def _attention(model: ModelConfig) -> int:
    hidden = model.hidden_size
    query = model.num_attention_heads * model.kv_channels
    qkv = query + 2 * model.num_query_groups * model.kv_channels
    biases = qkv * (model.add_bias_linear or model.add_qkv_bias) + hidden * model.add_bias_linear
    return hidden * qkv + query * hidden + biases


def _mlp(model: ModelConfig, ffn: int) -> int:
    fc1_rows = 2 * ffn if model.gated_linear_unit else ffn
    biases = (fc1_rows + model.hidden_size) * model.add_bias_linear
    return (fc1_rows + ffn) * model.hidden_size + biases


def _shared_expert(model: ModelConfig) -> int:
    ffn = model.moe_shared_expert_intermediate_size
    return 0 if ffn is None else _mlp(model, ffn) + model.hidden_size * model.moe_shared_expert_gate
