"""How the tensors of our checkpoints and of Hugging Face models correspond: one table, read in both directions.

It follows from the model's config alone: the Hugging Face classes of all architectures here share their names. Routed
experts are told apart from the rest, since each side stacks them in its own way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_tied.models.config import ModelConfig
from megatron_tied.models.latent_attention import is_latent, latent_sizes
from megatron_tied.topology import TieTopology

Shape = tuple[int, ...]

KINDS = ("gate", "up", "down")
EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Part:
    """A Hugging Face tensor: its name, and the names of the sizes that are its shape."""

    name: str
    rows: str
    columns: str | None = None


@dataclass(frozen=True)
class Rule:
    """One of our tensors and the Hugging Face tensors that it consists of, row block by row block.

    `groups` names the number of runs that the rows of each part are cut in: the blocks are the first run of every
    part in turn, then the second of every part, and so on. `state` is the prefix in our checkpoint.
    """

    ours: str
    parts: tuple[Part, ...]
    groups: str = "one"
    state: str = "weight"


def _copy(ours: str, theirs: str, rows: str, columns: str | None = None, state: str = "weight") -> Rule:
    return Rule(ours, (Part(theirs, rows, columns),), state=state)


def _gated(ours: str, theirs: str, width: str) -> tuple[Rule, Rule]:
    gate_and_up = tuple(Part(f"{theirs}.{kind}_proj.weight", width, "hidden") for kind in ("gate", "up"))
    return (
        Rule(f"{ours}.linear_fc1.weight", gate_and_up),
        _copy(f"{ours}.linear_fc2.weight", f"{theirs}.down_proj.weight", "hidden", width),
    )


_OUTSIDE = (
    _copy(EMBEDDING, "model.embed_tokens.weight", "vocabulary", "hidden"),
    _copy("decoder.final_layernorm.weight", "model.norm.weight", "hidden"),
)
_OUTPUT = _copy("output_layer.weight", "lm_head.weight", "vocabulary", "hidden")

_NORMS = (
    _copy("input_layernorm.weight", "input_layernorm.weight", "hidden"),
    _copy("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "hidden"),
)
_ATTENTION = (
    Rule(
        "self_attention.linear_qkv.weight",
        (
            Part("self_attn.q_proj.weight", "query", "hidden"),
            Part("self_attn.k_proj.weight", "key", "hidden"),
            Part("self_attn.v_proj.weight", "key", "hidden"),
        ),
        groups="query_groups",
    ),
    _copy("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "hidden", "query"),
)
_HEAD_NORMS = (
    _copy("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "head"),
    _copy("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "head"),
)
_PROJECTION_NORMS = (
    _copy("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "query"),
    _copy("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "key"),
)
_LATENT_ATTENTION = (
    _copy("self_attention.linear_kv_down_proj.weight", "self_attn.kv_a_proj_with_mqa.weight", "kv_down", "hidden"),
    _copy("self_attention.kv_layernorm.weight", "self_attn.kv_a_layernorm.weight", "kv_rank"),
    _copy("self_attention.linear_kv_up_proj.weight", "self_attn.kv_b_proj.weight", "kv_up", "kv_rank"),
    _copy("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "hidden", "value"),
)
_LATENT_QUERY = (_copy("self_attention.linear_q_proj.weight", "self_attn.q_proj.weight", "latent_query", "hidden"),)
_COMPRESSED_QUERY = (
    _copy("self_attention.linear_q_down_proj.weight", "self_attn.q_a_proj.weight", "query_rank", "hidden"),
    _copy("self_attention.q_layernorm.weight", "self_attn.q_a_layernorm.weight", "query_rank"),
    _copy("self_attention.linear_q_up_proj.weight", "self_attn.q_b_proj.weight", "latent_query", "query_rank"),
)
_DENSE = _gated("mlp", "mlp", "dense_ffn")
_SHARED = _gated("mlp.shared_experts", "mlp.shared_experts", "shared_ffn")
_ROUTER = (_copy("mlp.router.weight", "mlp.gate.weight", "experts", "hidden"),)
_EXPERT_BIAS = (_copy("mlp.router.expert_bias", "mlp.gate.e_score_correction_bias", "experts", state="buffer"),)


@dataclass(frozen=True)
class Entry:
    """A rule at its place: one tensor of ours outside the routed experts, and `theirs` by name and shape.

    `layer` is None outside the layers.
    """

    ours: str
    theirs: tuple[str, ...]
    shapes: tuple[Shape, ...]
    groups: int
    state: str
    layer: int | None

    @property
    def shape(self) -> Shape:
        """The shape of our tensor."""
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Our tensor from theirs."""
        if len(parts) == 1:
            return parts[0]
        runs = [part.reshape(self.groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(runs, dim=1).flatten(0, 1)

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """Theirs from our tensor."""
        if len(self.theirs) == 1:
            return [whole]
        rows = [shape[0] // self.groups for shape in self.shapes]
        runs = whole.view(self.groups, -1, *whole.shape[1:]).split(rows, dim=1)
        return [run.flatten(0, 1).contiguous() for run in runs]


def entries(config: ModelConfig, topology: TieTopology) -> Iterator[Entry]:
    """Every tensor of the model outside its routed experts. `config.vocab_size` must be given."""
    sizes = _sizes(config)
    outside = _OUTSIDE if config.share_embeddings_and_output_weights else (*_OUTSIDE, _OUTPUT)
    for rule in outside:
        yield _entry(rule, sizes, None)
    for layer in range(config.num_layers):
        is_moe = topology.bank_of_layer[layer] is not None
        experts = {"experts": topology.num_experts(layer, config.num_moe_experts)} if is_moe else {}
        for rule in _layer_rules(config, is_moe=is_moe):
            yield _entry(rule, sizes | experts, layer)


def expert_shape(config: ModelConfig, topology: TieTopology, layer: int, kind: str) -> Shape:
    """The shape of one kind of the matrices of the experts that `layer` uses: [experts, rows, columns]."""
    experts = topology.num_experts(layer, config.num_moe_experts)
    rows, columns = config.moe_ffn_hidden_size, config.hidden_size
    return (experts, columns, rows) if kind == "down" else (experts, rows, columns)


def bank_name(owner: int, kind: str) -> str:
    """The name of a bank's tensor in our checkpoint."""
    return f"decoder.layers.{owner}.mlp.experts.{kind}"


def expert_name(layer: int, expert: int, kind: str) -> str:
    """The name of one expert's matrix in a Hugging Face checkpoint."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{kind}_proj.weight"


def fused_name(layer: int, kind: str) -> str:
    """The name of the stacked tensor of a Hugging Face model that has `kind`; gate rows come before up rows."""
    return f"model.layers.{layer}.mlp.experts.{'down' if kind == 'down' else 'gate_up'}_proj"


def count(shape: Shape) -> int:
    """How many numbers a tensor of `shape` has."""
    return math.prod(shape)


def _layer_rules(config: ModelConfig, *, is_moe: bool) -> Iterator[Rule]:
    yield from _NORMS
    if is_latent(config):
        yield from _LATENT_ATTENTION
        yield from _LATENT_QUERY if latent_sizes(config).q_lora_rank is None else _COMPRESSED_QUERY
    else:
        yield from _ATTENTION
        if config.qk_layernorm:
            yield from _PROJECTION_NORMS if config.qk_norm_scope == "projection" else _HEAD_NORMS
    if not is_moe:
        yield from _DENSE
        return
    yield from _ROUTER
    if config.moe_router_enable_expert_bias:
        yield from _EXPERT_BIAS
    if config.moe_shared_expert_intermediate_size is not None:
        yield from _SHARED


def _entry(rule: Rule, sizes: Mapping[str, int], layer: int | None) -> Entry:
    ours, theirs = ("", "") if layer is None else (f"decoder.layers.{layer}.", f"model.layers.{layer}.")
    return Entry(
        ours=ours + rule.ours,
        theirs=tuple(theirs + part.name for part in rule.parts),
        shapes=tuple(_shape(part, sizes) for part in rule.parts),
        groups=sizes[rule.groups],
        state=rule.state,
        layer=layer,
    )


def _shape(part: Part, sizes: Mapping[str, int]) -> Shape:
    return (sizes[part.rows],) if part.columns is None else (sizes[part.rows], sizes[part.columns])


def _sizes(config: ModelConfig) -> dict[str, int]:
    heads, groups, head = config.num_attention_heads, config.num_query_groups, config.kv_channels
    found: dict[str, int | None] = {
        "one": 1,
        "vocabulary": config.vocab_size,
        "hidden": config.hidden_size,
        "query_groups": groups,
        "query": heads * head,
        "key": groups * head,
        "head": head,
        "dense_ffn": config.ffn_hidden_size,
        "shared_ffn": config.moe_shared_expert_intermediate_size,
    }
    if is_latent(config):
        latent = latent_sizes(config)
        found |= {
            "query_rank": latent.q_lora_rank,
            "kv_rank": latent.kv_lora_rank,
            "kv_down": latent.kv_lora_rank + latent.qk_pos_emb_head_dim,
            "kv_up": heads * (latent.qk_head_dim + latent.v_head_dim),
            "latent_query": heads * (latent.qk_head_dim + latent.qk_pos_emb_head_dim),
            "value": heads * latent.v_head_dim,
        }
    return {name: size for name, size in found.items() if size is not None}
