"""Named architectures as plain data: what a preset says, a config file may override key by key.

The sizes of `olmoe`, `deepseek` and `qwen3_moe`, and their loss coefficients, are those of the expert-tying
paper (arXiv:2606.16825); the attention and routing details are those of the Hugging Face model classes. Published
models (`megatron_tied.models.published`) have one size each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.models.published import PUBLISHED

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Preset:
    """An architecture: the `fields` of ModelConfig it sets, and those that differ between its `scales`."""

    fields: Fields
    scales: Mapping[str, Fields] = field(default_factory=dict)


def _size(hidden: int, heads: int, query_groups: int, expert_ffn: int) -> Fields:
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": query_groups,
        "moe_ffn_hidden_size": expert_ffn,
    }


_BALANCING = {"moe_aux_loss_coeff": 1e-2, "moe_z_loss_coeff": 1e-4}

_PAPER = {"vocab_size": 100_277, **_BALANCING}  # cl100k_base

_OLMOE = {
    **_PAPER,
    "num_layers": 16,
    "num_moe_experts": 64,
    "moe_router_topk": 8,
    "moe_router_pre_softmax": True,  # softmax over all experts, the chosen weights not renormalised
    "qk_layernorm": True,
    "qk_norm_scope": "projection",
    "qkv_clip": 8.0,
    "layernorm_epsilon": 1e-5,
    "rotary_base": 10_000,
}

_OLMOE_SCALES = {
    "regular": _size(2048, 16, 16, 1024),
    "small": _size(1024, 8, 8, 512),
    "tiny": _size(512, 4, 4, 256),
}

_QWEN3_ROUTING_AND_NORM = {
    "moe_router_topk": 4,
    "moe_router_pre_softmax": False,  # softmax over the chosen experts is the renormalised top-k
    "qk_layernorm": True,
    "qk_norm_scope": "head",
    "layernorm_epsilon": 1e-6,
}

_QWEN3_MOE = {
    **_PAPER,
    **_QWEN3_ROUTING_AND_NORM,
    "num_layers": 28,
    "num_moe_experts": 60,
    "rotary_base": 1_000_000,
}

_QWEN3_MOE_SCALES = {
    "regular": _size(1536, 24, 4, 768),
    "small": _size(768, 12, 2, 384),
    "tiny": _size(384, 6, 1, 192),
}

_QUICKSTART = {
    **_BALANCING,
    **_QWEN3_ROUTING_AND_NORM,
    **_size(256, 4, 4, 128),
    "vocab_size": 4096,
    "num_layers": 8,
    "num_moe_experts": 16,
    "rotary_base": 10_000,
}

PRESETS: Mapping[str, Preset] = {
    "olmoe": Preset(_OLMOE, _OLMOE_SCALES),
    "deepseek": Preset({**_OLMOE, "moe_router_topk": 6}, _OLMOE_SCALES),
    "qwen3_moe": Preset(_QWEN3_MOE, _QWEN3_MOE_SCALES),
    "quickstart": Preset(_QUICKSTART),
    **{name: Preset(fields) for name, fields in PUBLISHED.items()},
}

DEFAULT_SCALE = "regular"


def preset_fields(name: object, scale: object = None) -> dict[str, Any]:
    """All fields of preset `name` at `scale` (None: regular, if it has scales), both of these included.

    Raises ConfigError for an unknown preset or scale.
    """
    if not isinstance(name, str) or name not in PRESETS:
        close = get_close_matches(str(name), PRESETS, n=1)
        hint = f'; did you mean "{close[0]}"?' if close else ""
        raise ConfigError(Problem("model.preset", name, f"must be one of {', '.join(PRESETS)}{hint}"))
    preset = PRESETS[name]
    if not preset.scales:
        if scale is not None:
            raise ConfigError(Problem("model.scale", scale, f"must be left out: {name} has one size"))
        return {"preset": name, **preset.fields}
    scale = DEFAULT_SCALE if scale is None else scale
    if not isinstance(scale, str) or scale not in preset.scales:
        raise ConfigError(Problem("model.scale", scale, f"must be one of {', '.join(preset.scales)}"))
    return {"preset": name, "scale": scale, **preset.fields, **preset.scales[scale]}
