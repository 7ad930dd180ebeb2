"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) for hosts without Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from megatron_tied.layers.marks import mark


class LatentSelfAttention(MLASelfAttention):
    """Megatron-Core's latent attention whose down projections are whole on every tensor parallel rank.

    So they are with Transformer Engine. Upstream cuts them without it, and then loses in the gradient of the rotated
    part of the keys, which all heads share, what other ranks' heads add to it.
    """

    linear_kv_down_proj: torch.nn.Module
    linear_q_down_proj: torch.nn.Module

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.linear_kv_down_proj = _WholeLinear(self.linear_kv_down_proj)
        if self.config.q_lora_rank is not None:
            self.linear_q_down_proj = _WholeLinear(self.linear_q_down_proj)


class _WholeLinear(torch.nn.Module):
    """The matrix that `cut` holds a part of, uninitialised; returns the product, and no bias to add, as `cut` does."""

    def __init__(self, cut: ColumnParallelLinear):
        super().__init__()
        self.weight = torch.nn.Parameter(cut.weight.new_empty(cut.output_size, cut.input_size))
        # Each rank multiplies its part of the sequence.
        mark(self.weight, sequence_parallel=cut.config.sequence_parallel)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.nn.functional.linear(x, self.weight), None
