"""The parameters of a model one by one, by formula: no model is built, no torch imported."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from megatron_tied.models.config import ModelConfig
from megatron_tied.models.latent_attention import is_latent, latent_sizes
from megatron_tied.topology import Bank, TieTopology

Kind = Literal["embedding", "output", "attention", "norms", "router", "dense_mlp", "shared_experts", "bank"]


class Tensor(NamedTuple):
    """One parameter of the whole model, or `copies` of one size that stand side by side.

    numel: its elements over all ranks. cut: what spreads it over ranks: tensor parallelism, expert parallelism, or
    nothing. decays: whether it has two dimensions or more, hence weight decay. layer: None outside of the layers.
    bank: the index of the expert bank that it is part of, or whose layers share it beside their experts.
    """

    kind: Kind
    numel: int
    cut: Literal["tensor", "expert"] | None = None
    decays: bool = True
    layer: int | None = None
    bank: int | None = None
    copies: int = 1

    @property
    def expert_bank(self) -> int | None:
        """The index of the bank whose experts it is part of; None for what is no routed expert."""
        return self.bank if self.kind == "bank" else None


def model_tensors(model: ModelConfig, topology: TieTopology, vocab_size: int) -> Iterator[Tensor]:
    """All parameters in the order in which a built model lists them; a bank's stand in its owner's layer."""
    vocabulary = vocab_size * model.hidden_size
    yield Tensor("embedding", vocabulary, "tensor")
    for layer in range(model.num_layers):
        yield from layer_tensors(model, topology, layer)
    yield from _norm(model, model.hidden_size)
    if not model.share_embeddings_and_output_weights:
        yield Tensor("output", vocabulary, "tensor")


def layer_tensors(model: ModelConfig, topology: TieTopology, layer: int) -> Iterator[Tensor]:
    """The parameters that `layer` registers: a follower of a tie group has none of what the group shares."""
    for tensor in _layer(model, topology, layer):
        yield tensor._replace(layer=layer)


def _layer(model: ModelConfig, topology: TieTopology, layer: int) -> Iterator[Tensor]:
    share, bank = topology.tie.share, None
    if topology.bank_of_layer[layer] is not None and topology.bank(layer).is_tied:
        bank = topology.bank(layer).index
    owns = bank is None or topology.is_owner(layer)
    yield from _norm(model, model.hidden_size)
    if owns or share == "experts":
        for tensor in _latent_attention(model) if is_latent(model) else _attention(model):
            yield tensor._replace(bank=bank if share != "experts" else None)
    yield from _norm(model, model.hidden_size)
    if topology.bank_of_layer[layer] is None:
        yield from _mlp(model, "dense_mlp", model.ffn_hidden_size)
        return
    experts = topology.num_experts(layer, model.num_moe_experts)
    if owns or share != "all":
        for tensor in _router(model, experts):
            yield tensor._replace(bank=bank if share == "all" else None)
    if owns:
        yield from bank_tensors(model, topology.bank(layer), experts)
    if model.moe_shared_expert_intermediate_size is not None:
        if model.moe_shared_expert_gate:
            yield Tensor("shared_experts", model.hidden_size)
        yield from _mlp(model, "shared_experts", model.moe_shared_expert_intermediate_size)


def _router(model: ModelConfig, experts: int) -> Iterator[Tensor]:
    yield Tensor("router", experts * model.hidden_size)
    if model.add_bias_linear:
        yield Tensor("router", experts, decays=False)


def bank_tensors(model: ModelConfig, bank: Bank, experts: int) -> Iterator[Tensor]:
    """A bank's weights: two tensors in all, or two an expert, as the expert backend holds them."""
    for tensor in _mlp(model, "bank", model.moe_ffn_hidden_size):
        if model.expert_backend == "grouped":
            yield tensor._replace(cut="expert", bank=bank.index, numel=tensor.numel * experts)
        else:
            yield tensor._replace(cut="expert", bank=bank.index, copies=experts)


def _latent_attention(model: ModelConfig) -> Iterator[Tensor]:
    """The projections of latent attention; only those per head are cut by tensor parallelism."""
    hidden, heads, sizes = model.hidden_size, model.num_attention_heads, latent_sizes(model)
    query = heads * (sizes.qk_head_dim + sizes.qk_pos_emb_head_dim)
    yield Tensor("attention", heads * sizes.v_head_dim * hidden, "tensor")
    if model.add_bias_linear:
        yield Tensor("attention", hidden, decays=False)
    if sizes.q_lora_rank is None:
        yield Tensor("attention", query * hidden, "tensor")
    else:
        yield Tensor("attention", sizes.q_lora_rank * hidden)
        yield Tensor("attention", query * sizes.q_lora_rank, "tensor")
    yield Tensor("attention", (sizes.kv_lora_rank + sizes.qk_pos_emb_head_dim) * hidden)
    yield Tensor("attention", heads * (sizes.qk_head_dim + sizes.v_head_dim) * sizes.kv_lora_rank, "tensor")
    if model.qk_layernorm:
        yield from _norm(model, sizes.q_lora_rank) if sizes.q_lora_rank is not None else ()
        yield from _norm(model, sizes.kv_lora_rank)


def _attention(model: ModelConfig) -> Iterator[Tensor]:
    hidden = model.hidden_size
    query = model.num_attention_heads * model.kv_channels
    qkv = query + 2 * model.num_query_groups * model.kv_channels
    if (model.model_extra or {}).get("softmax_type") == "learnable":
        yield Tensor("attention", model.num_attention_heads, "tensor", decays=False)
    yield Tensor("attention", query * hidden, "tensor")
    if model.add_bias_linear:
        yield Tensor("attention", hidden, decays=False)
    yield Tensor("attention", qkv * hidden, "tensor")
    if model.add_bias_linear or model.add_qkv_bias:
        yield Tensor("attention", qkv, "tensor", decays=False)
    if model.qk_layernorm:
        for heads in (model.num_attention_heads, model.num_query_groups):
            if model.qk_norm_scope == "projection":
                yield Tensor("norms", heads * model.kv_channels, "tensor", decays=False)
            else:
                yield from _norm(model, model.kv_channels)


def _norm(model: ModelConfig, width: int) -> Iterator[Tensor]:
    for _ in range(1 if model.normalization == "RMSNorm" else 2):
        yield Tensor("norms", width, decays=False)


def _mlp(model: ModelConfig, kind: Kind, ffn: int) -> Iterator[Tensor]:
    fc1_rows = 2 * ffn if model.gated_linear_unit else ffn
    yield Tensor(kind, fc1_rows * model.hidden_size, "tensor")
    if model.add_bias_linear:
        yield Tensor(kind, fc1_rows, "tensor", decays=False)
    yield Tensor(kind, model.hidden_size * ffn, "tensor")
    if model.add_bias_linear:
        yield Tensor(kind, model.hidden_size, decays=False)
