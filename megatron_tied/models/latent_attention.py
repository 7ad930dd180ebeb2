"""The keys of multi-head latent attention, which are those of Megatron-Core's MLATransformerConfig.

`ModelConfig` keeps them without naming them: here it is any `BaseModel` with such keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

from megatron_tied.errors import Problem

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


def is_latent(model: BaseModel) -> bool:
    """Whether attention is multi-head latent attention (DeepSeek-V2)."""
    return bool(_extra(model).get("multi_latent_attention"))


def latent_sizes(model: BaseModel) -> LatentSizes:
    """The widths that `model` gives, and Megatron-Core's for the rest."""
    extra = _extra(model)
    return LatentSizes(**{name: extra[name] for name in LatentSizes._fields if name in extra})


def latent_problems(model: BaseModel) -> list[Problem]:
    """What is wrong with the keys of latent attention, or has no effect on another."""
    extra, sizes = _extra(model), latent_sizes(model)
    if not is_latent(model):
        valid = "needs model.multi_latent_attention = true"
        return [Problem(f"model.{name}", extra[name], valid) for name in _KEYS if name in extra]
    positional, rope = sizes.qk_pos_emb_head_dim, extra.get("rope_type", "yarn")
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
    ]
    return [Problem(f"model.{name}", value, valid) for name, value, is_wrong, valid in checks if is_wrong]


def _extra(model: BaseModel) -> Mapping[str, Any]:
    return model.model_extra or {}
