"""PyTorch's own norms under sequence parallelism, for hosts with neither Transformer Engine nor apex."""

from __future__ import annotations

import copy

import torch
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig


class TorchNorm(WrappedTorchNorm):
    """`torch.nn.RMSNorm` or `LayerNorm` by `config.normalization`, as upstream makes it, sequence parallel or not.

    Upstream refuses sequence parallelism because nobody would sum the gradients of the norm's parameters, each rank
    having seen a part of the tokens (of the heads, in a query or key norm). They carry Megatron-Core's mark for
    that, and `engine.tensor_parallel` sums them.
    """

    def __new__(cls, config: TransformerConfig, *args, **kwargs) -> torch.nn.Module:
        """Arguments as upstream: config, hidden_size, eps, ...; raises `AssertionError` for what torch cannot do."""
        plain = copy.copy(config)
        plain.sequence_parallel = False
        norm = super().__new__(cls, plain, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
