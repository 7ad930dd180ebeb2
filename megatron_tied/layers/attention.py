"""OLMoE's attention: query and key are normalised over the whole projection, then q, k and v are clipped."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_tied.layers.norm import RMSNorm


class ProjectionRMSNorm(RMSNorm):
    """RMSNorm over all heads of a query or key at once: input and output [..., heads on this rank, head width].

    `hidden_size` is one head's width, as Megatron-Core's attention passes it; `heads` counts those of all tensor
    parallel ranks, each of which has the gains of its own heads. Source: OLMoE in Hugging Face transformers
    (`OlmoeAttention.q_norm`), where the norm precedes the split in heads.
    """

    eps: float

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, *, heads: int):
        super().__init__(heads // config.tensor_model_parallel_size * hidden_size, eps=eps)
        self.width = heads * hidden_size
        self.is_whole = config.tensor_model_parallel_size == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projection = x.flatten(-2)
        if self.is_whole:
            return super().forward(projection).view_as(x)
        group = parallel_state.get_tensor_model_parallel_group()
        squares = _sum_over_ranks(projection.float().square().sum(-1, keepdim=True), group)
        normalised = projection * torch.rsqrt(squares / self.width + self.eps)
        return (normalised * self.weight).to(x.dtype).view_as(x)


def _sum_over_ranks(x: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """A sum that every rank goes on with, and whose gradient every rank has a part of."""
    total: torch.Tensor = _SumOverRanks.apply(x, group)  # type: ignore[no-untyped-call]  # torch leaves apply without types
    return total


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _sum_over_ranks(gradient, ctx.group), None


class ClippedSelfAttention(SelfAttention):
    """Self-attention that clamps query, key and value to [-qkv_clip, qkv_clip] after their norms."""

    def __init__(self, *args: Any, qkv_clip: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.qkv_clip = qkv_clip

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """As upstream; each returned tensor is clamped."""
        qkv = super().get_query_key_value_tensors(*args, **kwargs)
        return tuple(_Clip.apply(tensor, self.qkv_clip) for tensor in qkv)  # type: ignore[no-untyped-call]  # torch leaves apply without types


class _Clip(torch.autograd.Function):
    """`torch.clamp` between -limit and limit, with one kernel in backward, where that takes four."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, limit: float) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.limit = limit
        return x.clamp(-limit, limit)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        # At the limit itself the gradient passes, which it does not where `hardtanh` clips.
        above = _next_above(ctx.limit, x.dtype)
        return torch.ops.aten.hardtanh_backward(gradient, x, -above, above), None


@cache
def _next_above(number: float, dtype: torch.dtype) -> float:
    return torch.nextafter(torch.tensor(number, dtype=dtype), torch.tensor(torch.inf, dtype=dtype)).item()
