"""What one micro-batch leaves in memory for its backward pass, and what backward needs on top, layer by layer.

Derived from what autograd saves in Megatron-Core 0.16's local layers with our grouped experts, and for fused kernels
from what Transformer Engine's saves in their place. Bytes on one rank, one micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from megatron_tied.models.config import ModelConfig
from megatron_tied.models.latent_attention import is_latent, latent_sizes
from megatron_tied.planner.layout import Layout, Recompute
from megatron_tied.topology import TieTopology

_FP32 = 4
_INT64 = 8


class Kernels(NamedTuple):
    """Which kernels a host has: flash attention keeps no scores, a fused norm or activation no intermediates, and a
    product that adds to what is there wants no copy of several layers' tokens for a fused weight gradient."""

    fused_attention: bool
    fused_norm: bool
    fused_activation: bool
    adding_product: bool


UNFUSED = Kernels(fused_attention=False, fused_norm=False, fused_activation=False, adding_product=True)
FUSED = Kernels(fused_attention=True, fused_norm=True, fused_activation=True, adding_product=False)

# What each of Megatron-Core's recompute_modules leaves out, by the names of `LayerActivations.saved`.
_LEFT_OUT: Mapping[str, tuple[str, ...]] = {
    "core_attn": ("attention scores",),
    "layernorm": ("norms", "norm outputs"),
    "mlp": ("dense MLP",),
    "moe": ("router", "dispatched tokens", "expert hidden", "expert activations", "shared experts"),
    "moe_act": ("expert activations",),
    # What comes out of the up-projections cannot be told from the rest here: nothing is counted as saved.
    "mla_up_proj": (),
    "shared_experts": ("shared experts",),
}


class Widths(NamedTuple):
    """Numbers per token in attention: all query heads, key and value before they are spread over query heads."""

    query: int
    key: int
    value: int
    output: int


def attention_widths(model: ModelConfig) -> Widths:
    """The widths of attention, of all tensor parallel ranks together."""
    heads = model.num_attention_heads
    if is_latent(model):
        sizes = latent_sizes(model)
        query = heads * (sizes.qk_head_dim + sizes.qk_pos_emb_head_dim)
        return Widths(query, query, heads * sizes.v_head_dim, heads * sizes.v_head_dim)
    key = model.num_query_groups * model.kv_channels
    query = heads * model.kv_channels
    return Widths(query, key, key, query)


def busiest(model: ModelConfig, layout: Layout) -> float:
    """Tokens of the busiest expert parallel rank over the mean.

    Alone, a rank's experts get exactly what its own router sends. A capacity factor bounds what any expert gets, and
    with padding every expert gets that.
    """
    extra = model.model_extra or {}
    capacity: float | None = extra.get("moe_expert_capacity_factor")
    if capacity is not None and extra.get("moe_pad_expert_input_to_capacity"):
        return capacity
    imbalance = layout.imbalance if layout.expert_parallel > 1 else 1.0
    return imbalance if capacity is None else min(imbalance, capacity)


def routed_tokens(model: ModelConfig, layout: Layout) -> int:
    """Tokens, counted once for each of their experts, that come to the local experts of the busiest rank."""
    return int(layout.tokens * model.moe_router_topk * busiest(model, layout))


@dataclass(frozen=True)
class LayerActivations:
    """One layer: what it saves by kind, its input, and the gradients and buffers at work in its backward pass."""

    saved: Mapping[str, int]
    input: int
    backward: int
    # Inputs and output gradients of the experts' products, which a fused weight gradient holds to the owner; and those
    # of the larger product.
    weight_gradient_inputs: int
    largest_gradient_inputs: int

    def kept(self, modules: frozenset[str]) -> int:
        """Bytes from forward to backward when `modules` are computed again."""
        left_out = {name for module in modules for name in _LEFT_OUT[module]}
        kept = sum(size for name, size in self.saved.items() if name not in left_out)
        # A recomputed norm starts from its inputs, the attention's and the MLP's.
        return kept + 2 * self.input if "layernorm" in modules else kept

    @property
    def all(self) -> int:
        """Bytes that are there in backward, when everything is."""
        return sum(self.saved.values())


def layer_activations(
    model: ModelConfig, topology: TieTopology, layout: Layout, layer: int, kernels: Kernels
) -> LayerActivations:
    """The activations of `layer` on one rank."""
    width, tokens = layout.width, layout.tokens
    hidden = tokens * model.hidden_size
    saved = {
        "norms": 2 * _norm(model, layout, model.hidden_size, kernels),
        "norm outputs": 2 * hidden * width,
        **_attention(model, layout, kernels),
    }
    scores = saved["attention scores"]
    attention_backward = 2 * scores + 4 * hidden * width
    if topology.bank_of_layer[layer] is None:
        ffn = tokens * model.ffn_hidden_size
        saved["dense MLP"] = _mlp_saved(model, kernels) * ffn * width
        backward = max(attention_backward, 3 * ffn * width + 2 * hidden * width)
        return LayerActivations(saved, hidden * width, backward, 0, 0)
    routed, ffn = routed_tokens(model, layout), model.moe_ffn_hidden_size
    fc1_rows = 2 * ffn if model.gated_linear_unit else ffn
    experts = topology.num_experts(layer, model.num_moe_experts)
    saved |= {
        "router": _router(model, layout, experts),
        "dispatched tokens": routed * (model.hidden_size * width + _INT64),
        "expert hidden": routed * fc1_rows * width,
        "expert activations": routed * ffn * _expert_activations(model) * width,
    }
    if shared := model.moe_shared_expert_intermediate_size:
        saved["shared experts"] = _mlp_saved(model, kernels) * tokens * shared * width
    # Gradients of the experts' outputs and of both halves of their hidden states, each there twice for a moment.
    expert_backward = routed * (model.hidden_size + 2 * fc1_rows) * width + 2 * hidden * width
    held = [routed * (model.hidden_size + other) * width for other in (fc1_rows, ffn)]
    return LayerActivations(saved, hidden * width, max(attention_backward, expert_backward), sum(held), max(held))


def _norm(model: ModelConfig, layout: Layout, features: int, kernels: Kernels) -> int:
    """What a norm over `features` per token saves beside its output."""
    numbers = layout.tokens * features
    if kernels.fused_norm or model.normalization == "LayerNorm" or layout.precision == "fp32":
        return numbers * layout.width + layout.tokens * _FP32
    # PyTorch's RMSNorm computes in fp32 and saves its input and the normalised input in it.
    return 2 * numbers * _FP32 + layout.tokens * _FP32


def _attention(model: ModelConfig, layout: Layout, kernels: Kernels) -> dict[str, int]:
    # Sequence parallel outside of attention, cut by heads inside: the same product.
    width, tokens, sizes = layout.width, layout.tokens, attention_widths(model)
    heads = model.num_attention_heads
    # Flash attention has no kernel for values of another width on a host without Transformer Engine.
    is_fused = kernels.fused_attention or not is_latent(model)
    numbers = sizes.query + (sizes.key if is_fused else sizes.query) + sizes.output
    extra, whole_is_kept = _before_attention(model, layout, kernels)
    if kernels.fused_attention:
        # The value is a view of what came out of the projection, and keeps all of it.
        numbers += 0 if whole_is_kept else _projected(model, sizes)
    else:
        # `ScaledDotProductAttention` copies it, and PyTorch's fused kernel leaves an output that is copied, too.
        numbers += sizes.value + (sizes.output if is_fused else 0)
    saved = tokens * numbers * width + extra
    if is_fused:
        return {"attention": saved, "attention scores": tokens * heads * _FP32}
    # Softmax in fp32, and a copy of it in the width of the values.
    per_score = _FP32 if layout.precision == "fp32" else _FP32 + width
    return {"attention": saved, "attention scores": tokens * layout.seq_length * heads * per_score}


def _projected(model: ModelConfig, sizes: Widths) -> int:
    """Numbers per token of the tensor that the value is a part of."""
    if is_latent(model):
        return model.num_attention_heads * latent_sizes(model).qk_head_dim + sizes.value
    return sizes.query + sizes.key + sizes.value


def _before_attention(model: ModelConfig, layout: Layout, kernels: Kernels) -> tuple[int, bool]:
    """Bytes that norms, clipping and rotary positions save, and whether they keep all of the projection's output."""
    width, tokens, sizes = layout.width, layout.tokens, attention_widths(model)
    rotated = latent_sizes(model).qk_pos_emb_head_dim if is_latent(model) else model.kv_channels
    # Sines and cosines, for query and for key.
    saved = 4 * layout.seq_length * rotated * width
    if is_latent(model):
        latent = latent_sizes(model)
        down = (latent.q_lora_rank or 0) + latent.kv_lora_rank + latent.qk_pos_emb_head_dim
        return saved + tokens * 2 * down * width, False
    if model.qkv_clip is not None:
        saved += tokens * (sizes.query + sizes.key + sizes.value) * width
    if not model.qk_layernorm:
        return saved, False
    saved += _norm(model, layout, sizes.query, kernels) + _norm(model, layout, sizes.key, kernels)
    # The key's norm saves its input where it lies, beside query and value, unless it has made it fp32 first, or has
    # put the heads together.
    in_place = layout.precision == "fp32" or kernels.fused_norm or model.normalization == "LayerNorm"
    in_place = in_place and model.qk_norm_scope == "head"
    if in_place:
        saved += tokens * (sizes.query + sizes.value) * width
    return saved, in_place


def _router(model: ModelConfig, layout: Layout, experts: int) -> int:
    """Softmax for the auxiliary loss, probabilities and map by expert, chosen experts and where tokens went."""
    chosen = model.moe_router_topk * (2 * _INT64 + _FP32)
    return layout.tokens * (experts * (_FP32 + layout.width + 1) + chosen)


def _expert_activations(model: ModelConfig) -> int:
    """Numbers per hidden unit that an expert's activation saves beside its input.

    Its output, which the second product keeps. What `layers.swiglu` does not know keeps the activated gate and its
    product with the other half, too.
    """
    if not model.gated_linear_unit:
        return 2
    return 1 if model.activation == "silu" else 3


def _mlp_saved(model: ModelConfig, kernels: Kernels) -> int:
    """Numbers per hidden unit that a dense MLP saves.

    Fused: gate, up, and their product. Else the activated gate and a shifted copy of up, too.
    """
    if not model.gated_linear_unit:
        return 2
    return 3 if kernels.fused_activation and model.has_fused_activation() else 5


class LossActivations(NamedTuple):
    """The output layer and cross entropy: what they save for backward, and what they need for a moment besides."""

    saved: int
    extra: int


def loss_activations(model: ModelConfig, layout: Layout, vocab_size: int, kernels: Kernels) -> LossActivations:
    """Activations from the last layer's output to the loss, on one rank."""
    # All tokens times this rank's part of the vocabulary, which is this rank's tokens times all of it.
    logits = layout.tokens * vocab_size
    saved = _norm(model, layout, model.hidden_size, kernels) + layout.tokens * model.hidden_size * layout.width
    # Cross entropy saves the exponentials in fp32, which in fp32 take the place of the logits.
    extra = logits * layout.width if layout.precision != "fp32" else 0
    return LossActivations(saved + logits * _FP32, extra)


def recomputed(layers: Mapping[int, LayerActivations], layer: int, recompute: Recompute, num_layers: int) -> int:
    """Bytes that come back into memory when backward reaches `layer`, beside what was kept."""
    segment = recompute.segment(layer, num_layers)
    if segment:
        return sum(layers[index].all for index in segment if index in layers and index <= layer)
    return layers[layer].all - layers[layer].kept(recompute.modules) if recompute.modules else 0
