"""Core attention on `torch.nn.functional.scaled_dot_product_attention`, for hosts without Transformer Engine."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_tied.errors import ConfigError, Problem

_ONLY: dict[str, Any] = {"window_size": None, "softmax_type": "vanilla", "context_parallel_size": 1}


def unsupported_options(config: TransformerConfig) -> list[Problem]:
    """The options of `config` that `ScaledDotProductAttention` does not implement."""
    return [
        Problem(f"model.{name}", value, f"must be {only!r} on this host: another needs Transformer Engine")
        for name, only in _ONLY.items()
        if (value := getattr(config, name)) != only
    ]


class ScaledDotProductAttention(MegatronModule):
    """Softmax attention; takes the place of Megatron-Core's `DotProductAttention`, which keeps every score.

    Values may be narrower or wider than keys, as in latent attention, and query heads may share keys. `softmax_scale`
    defaults to 1 / sqrt(key width). Raises `ConfigError` for options that only Transformer Engine implements.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__(config=config)
        if problems := unsupported_options(config):
            raise ConfigError(problems)
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: None = None,
    ) -> torch.Tensor:
        """Query, key and value [sequence, batch, heads on this rank, width] give [sequence, batch, heads x width].

        `attention_mask` [batch or 1, 1, queries, keys] is True where a query may not attend, as in Megatron-Core;
        None stands for the mask that the layer's `attn_mask_type` names. `attn_mask_type` has no effect, as upstream.
        """
        if packed_seq_params is not None or attention_bias is not None:
            raise NotImplementedError("packed sequences and attention biases need Transformer Engine")
        # Rows that lie a whole batch apart, as Megatron-Core has them, are slow to read on a CPU; and a value that is a
        # view would keep all of what the projection has made.
        query, key, value = (tensor.permute(1, 2, 0, 3).contiguous() for tensor in (query, key, value))
        # Upstream's rule: ranks that share the sequence drop from the stream that each has of its own.
        stream = nullcontext() if self.config.sequence_parallel else get_cuda_rng_tracker().fork()
        with stream if self.training and self.dropout else nullcontext():
            context = torch.nn.functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=None if attention_mask is None else ~attention_mask,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=attention_mask is None and self.attn_mask_type == AttnMaskType.causal and query.size(2) > 1,
                scale=self.softmax_scale,
                enable_gqa=query.size(1) != key.size(1),
            )
        return context.permute(2, 0, 1, 3).flatten(2)
