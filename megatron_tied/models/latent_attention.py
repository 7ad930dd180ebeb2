"""The keys of multi-head latent attention, which are those of Megatron-Core's MLATransformerConfig."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_tied.errors import Problem

if TYPE_CHECKING:
    from megatron_tied.models.config import ModelConfig

_OF_YARN = (
    *("rotary_scaling_factor", "original_max_position_embeddings"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
)


class LatentSizes(NamedTuple):
    """The widths of latent attention, named as in Megatron-Core's MLATransformerConfig, with its defaults."""

    q_lora_rank: int | None = 512
    kv_lora_rank: int = 512
    qk_head_dim: int = 128
    qk_pos_emb_head_dim: int = 64
    v_head_dim: int = 128


_KEYS = (*LatentSizes._fields, "rope_type", *_OF_YARN)


def is_latent(model: ModelConfig) -> bool:
    """Whether attention is multi-head latent attention (DeepSeek-V2)."""
    return bool(_extra(model).get("multi_latent_attention"))


def latent_sizes(model: ModelConfig) -> LatentSizes:
    """The widths that `model` gives, and Megatron-Core's for the rest."""
    extra = _extra(model)
    return LatentSizes(**{name: extra[name] for name in LatentSizes._fields if name in extra})


def latent_problems(model: ModelConfig) -> list[Problem]:
    """What is wrong with the keys of latent attention, or has no effect on it, or on any other."""
    extra, sizes = _extra(model), latent_sizes(model)
    if not is_latent(model):
        valid = "needs model.multi_latent_attention = true"
        return [Problem(f"model.{name}", extra[name], valid) for name in _KEYS if name in extra]
    heads, rope = model.num_attention_heads, extra.get("rope_type", "yarn")
    no_effect = "must be left out: it has no effect on latent attention"
    positional = sizes.qk_pos_emb_head_dim
    checks = [
        *(
            (name, width, isinstance(width, int) and width < 1, "must be at least 1")
            for name, width in sizes._asdict().items()
        ),
        (
            "qk_pos_emb_head_dim",
            positional,
            isinstance(positional, int) and positional % 2,
            "must be even, for rotary position embeddings",
        ),
        ("rope_type", rope, rope not in ("rope", "yarn"), 'must be "rope" or "yarn"'),
        *(
            (name, extra.get(name), rope == "rope" and name in extra, 'needs model.rope_type = "yarn"')
            for name in _OF_YARN
        ),
        (
            "num_query_groups",
            model.num_query_groups,
            model.num_query_groups != heads,
            f"must be model.num_attention_heads = {heads}: latent attention has a key for every head",
        ),
        ("qk_norm_scope", model.qk_norm_scope, model.qk_norm_scope != "head", no_effect),
        ("qkv_clip", model.qkv_clip, model.qkv_clip is not None, no_effect),
        ("add_qkv_bias", model.add_qkv_bias, model.add_qkv_bias, no_effect),
    ]
    return [Problem(f"model.{name}", value, valid) for name, value, bad, valid in checks if bad]


def _extra(model: ModelConfig) -> Mapping[str, Any]:
    return model.model_extra or {}
