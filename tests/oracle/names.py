"""Where each weight of the reference lives in a Megatron-Core model: names, QKV packing, expert slices.

Written from the published layouts of both sides, and independent of the project's own converters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .reference import ReferenceSpec, Weights

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_PLAIN = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.experts.fc1_weight": "mlp.experts.gate_up_proj",
    "mlp.experts.fc2_weight": "mlp.experts.down_proj",
    # DeepSeek-V2 and V3
    "self_attention.linear_q_proj.weight": "self_attn.q_proj.weight",
    "self_attention.linear_q_down_proj.weight": "self_attn.q_a_proj.weight",
    "self_attention.linear_q_up_proj.weight": "self_attn.q_b_proj.weight",
    "self_attention.linear_kv_down_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "self_attention.linear_kv_up_proj.weight": "self_attn.kv_b_proj.weight",
    "self_attention.kv_layernorm.weight": "self_attn.kv_a_layernorm.weight",
    "mlp.shared_experts.linear_fc2.weight": "mlp.shared_experts.down_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
_COMPRESSED_QUERY_NORM = {"self_attention.q_layernorm.weight": "self_attn.q_a_layernorm.weight"}
_GATE_AND_UP = {"mlp.linear_fc1.weight": "mlp.", "mlp.shared_experts.linear_fc1.weight": "mlp.shared_experts."}
_OUTSIDE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_SEQUENTIAL = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.linear_fc([12])\.weight")


def _plain(spec: ReferenceSpec, rest: str) -> str:
    if spec.arch.startswith("deepseek") and rest in _COMPRESSED_QUERY_NORM:
        return _COMPRESSED_QUERY_NORM[rest]
    return _PLAIN[rest]


def _projections(spec: ReferenceSpec, layer: str) -> list[tuple[str, int]]:
    """Each projection of a layer's attention, with how many heads one KV group has of it."""
    per_group = spec.num_heads // spec.num_kv_heads
    prefix = f"model.layers.{layer}.self_attn."
    return [
        (f"{prefix}q_proj.weight", per_group),
        (f"{prefix}k_proj.weight", 1),
        (f"{prefix}v_proj.weight", 1),
    ]


def to_megatron(spec: ReferenceSpec, reference: Mapping[str, Tensor], name: str, experts: slice) -> Tensor:
    """The value of the Megatron parameter `name` on a rank that holds the global `experts`."""
    if name in _OUTSIDE:
        return reference[_OUTSIDE[name]]
    layer, rest = _LAYER.fullmatch(name).groups()
    prefix = f"model.layers.{layer}."
    if rest == "self_attention.linear_qkv.weight":
        parts = [
            reference[full].view(spec.num_kv_heads, heads * spec.head_dim, spec.hidden_size)
            for full, heads in _projections(spec, layer)
        ]
        return torch.cat(parts, dim=1).flatten(0, 1)
    if rest in _GATE_AND_UP:
        mlp = prefix + _GATE_AND_UP[rest]
        return torch.cat([reference[f"{mlp}gate_proj.weight"], reference[f"{mlp}up_proj.weight"]])
    if sequential := _SEQUENTIAL.fullmatch(rest):
        local, which = sequential.groups()
        fused = "gate_up_proj" if which == "1" else "down_proj"
        return reference[f"{prefix}mlp.experts.{fused}"][experts][int(local)]
    value = reference[prefix + _plain(spec, rest)]
    return value[experts] if ".experts." in rest else value


def to_reference(spec: ReferenceSpec, values: Mapping[str, Tensor]) -> Weights:
    """Reference names and shapes of Megatron parameters (or gradients) that hold ALL experts."""
    result: Weights = {}
    stacked: dict[str, dict[int, Tensor]] = {}
    for name, value in values.items():
        if name in _OUTSIDE:
            result[_OUTSIDE[name]] = value
            continue
        layer, rest = _LAYER.fullmatch(name).groups()
        prefix = f"model.layers.{layer}."
        if rest == "self_attention.linear_qkv.weight":
            packed = value.view(spec.num_kv_heads, -1, spec.hidden_size)
            projections = _projections(spec, layer)
            pieces = packed.split([heads * spec.head_dim for _, heads in projections], dim=1)
            result |= {full: piece.flatten(0, 1) for (full, _), piece in zip(projections, pieces, strict=True)}
        elif rest in _GATE_AND_UP:
            mlp = prefix + _GATE_AND_UP[rest]
            result |= dict(zip((f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"), value.chunk(2), strict=True))
        elif sequential := _SEQUENTIAL.fullmatch(rest):
            expert, which = sequential.groups()
            fused = "gate_up_proj" if which == "1" else "down_proj"
            stacked.setdefault(f"{prefix}mlp.experts.{fused}", {})[int(expert)] = value
        else:
            result[prefix + _plain(spec, rest)] = value
    for full, experts in stacked.items():
        result[full] = torch.stack([experts[index] for index in sorted(experts)])
    return result


_COLUMN_PARALLEL = re.compile(
    r"(word_embeddings|output_layer|linear_qkv|linear_fc1|linear_q_proj|linear_(q|kv)_up_proj)\.(weight|bias)"
)
_ROW_PARALLEL = re.compile(r"(linear_proj|linear_fc2)\.weight")
_QUERY_KEY_NORM = re.compile(r"[qk]_layernorm\.weight")


def tensor_parallel_dim(name: str, *, projection_norm: bool) -> int | None:
    """Along which dimension tensor parallel ranks hold parts of the Megatron parameter `name`; None: it is whole.

    By KV group for `linear_qkv`, by head for the projection behind it and for query and key norms that span the whole
    projection, by token for embedding and output, by neuron in dense and shared MLPs, by head where latent attention
    has heads. Routed experts are whole.
    """
    if ".experts." in name:
        return None
    if _COLUMN_PARALLEL.search(name) or (projection_norm and _QUERY_KEY_NORM.search(name)):
        return 0
    return 1 if _ROW_PARALLEL.search(name) else None


def join_tensor_parallel(name: str, parts: Sequence[Tensor], dim: int) -> Tensor:
    """The whole Megatron parameter `name` from its parts by rank; `linear_fc1` has gate rows, then up rows."""
    if "linear_fc1" in name:
        gates, ups = zip(*(part.chunk(2, dim) for part in parts), strict=True)
        return torch.cat([*gates, *ups], dim)
    return torch.cat(list(parts), dim)


def tensor_parallel_part(name: str, value: Tensor, dim: int, rank: int, size: int) -> Tensor:
    """What rank `rank` of `size` holds of the whole Megatron parameter `name`."""
    pieces = value.chunk(2, dim) if "linear_fc1" in name else (value,)
    return torch.cat([piece.chunk(size, dim)[rank] for piece in pieces], dim)


def all_experts_name(name: str, first_expert: int) -> str:
    """The name of a sequential expert's weight under its global index; other names as they are."""
    return re.sub(r"(local_experts\.)(\d+)", lambda match: f"{match[1]}{int(match[2]) + first_expert}", name, count=1)
