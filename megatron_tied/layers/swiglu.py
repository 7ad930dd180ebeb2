"""The experts' gated activation, SiLU(gate) x up x routing probability, without a copy of anything in between."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl


def weighted_swiglu(hidden: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """hidden [n, 2 ffn], gate first, and probs [n] float32 give [n, ffn] in the dtype of `hidden`.

    Only these two are kept for backward. On CUDA it is Megatron-Core's compiled `WeightedSwiGLUFunction`.
    """
    activated: torch.Tensor
    if hidden.is_cuda:
        activated = weighted_bias_swiglu_impl(hidden, None, probs.unsqueeze(-1))
    else:
        activated = _WeightedSwiGLU.apply(hidden, probs)  # type: ignore[no-untyped-call]  # torch leaves apply without types
    return activated


# Of the rows that are worked on at once: what is in between then stays in the processor's cache.
_ELEMENTS = 1 << 19


class _WeightedSwiGLU(torch.autograd.Function):
    """For hosts without a compiler."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, probs)
        output = hidden.new_empty(len(hidden), hidden.shape[1] // 2)
        for part, weights, into in zip(*_by_rows(hidden, probs, output), strict=True):
            gate, up = part.chunk(2, dim=-1)
            torch.mul(torch.nn.functional.silu(gate).mul_(up), weights.unsqueeze(-1), out=into)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, probs = ctx.saved_tensors
        of_hidden, of_probs = torch.empty_like(hidden), torch.empty_like(probs)
        for parts in zip(*_by_rows(hidden, probs, gradient, of_hidden, of_probs), strict=True):
            _gradients(*parts)
        return of_hidden, of_probs


def _by_rows(hidden: torch.Tensor, *others: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    rows = max(1, 2 * _ELEMENTS // hidden.shape[1])
    return [torch.split(tensor, rows) for tensor in (hidden, *others)]


def _gradients(
    hidden: torch.Tensor, probs: torch.Tensor, gradient: torch.Tensor, of_hidden: torch.Tensor, of_probs: torch.Tensor
) -> None:
    (gate, up), (of_gate, of_up) = hidden.chunk(2, dim=-1), of_hidden.chunk(2, dim=-1)
    activated = torch.nn.functional.silu(gate)
    # One probability a token: its product with a narrower gradient is rounded to that.
    weighted = gradient.mul(probs.unsqueeze(-1)).to(gradient.dtype)
    torch.mul(weighted, activated, out=of_up)
    torch.ops.aten.silu_backward.grad_input(weighted.mul_(up), gate, grad_input=of_gate)
    # Routers learn from this sum: its terms are not rounded.
    terms = activated.mul_(up).to(torch.promote_types(hidden.dtype, probs.dtype)).mul_(gradient)
    of_probs.copy_(terms.sum(-1))
