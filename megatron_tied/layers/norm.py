"""PyTorch's own norms under sequence parallelism, for hosts with neither Transformer Engine nor apex."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_tied.layers.marks import mark


class TorchNorm(WrappedTorchNorm):
    """`RMSNorm` or `torch.nn.LayerNorm` by `config.normalization`, as upstream makes it, sequence parallel or not.

    Upstream refuses sequence parallelism because nobody would sum the gradients of the norm's parameters, each rank
    having seen a part of the tokens (of the heads, in a query or key norm). They carry Megatron-Core's mark for
    that, and `engine.tensor_parallel` sums them.
    """

    def __new__(cls, config: TransformerConfig, *args: Any, **kwargs: Any) -> torch.nn.Module:  # type: ignore[misc]  # a norm of another class, as upstream's
        """Arguments as upstream: config, hidden_size, eps, ...; raises `AssertionError` for what torch cannot do."""
        plain = copy.copy(config)
        plain.sequence_parallel = False
        norm: torch.nn.Module = super().__new__(cls, plain, *args, **kwargs)
        if type(norm) is torch.nn.RMSNorm:
            norm.__class__ = RMSNorm
        for parameter in norm.parameters():
            mark(parameter, sequence_parallel=config.sequence_parallel)
        return norm


class RMSNorm(torch.nn.RMSNorm):
    """torch's, in float32 with half of its passes over memory on a CPU, where torch has no kernel of its own for it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., *normalized_shape] -> the same."""
        plain = x.dtype == torch.float32 == getattr(self.weight, "dtype", None) and self.eps is not None
        if x.is_cuda or not plain or x.dim() < 2 or len(self.normalized_shape) > 1:
            return super().forward(x)
        normalised: torch.Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]  # torch leaves apply without types
        return normalised


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.nn.Parameter, eps: float) -> torch.Tensor:
        norm: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normalised = x * scale
        products = gradient * normalised
        of_weight = products.flatten(0, -2).sum(0)
        mean = (products @ weight).unsqueeze(-1).div_(x.shape[-1])
        of_x = torch.mul(gradient, weight, out=products).addcmul_(normalised, mean, value=-1).mul_(scale)
        return of_x, of_weight, None
