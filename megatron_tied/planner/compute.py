"""Floating point operations of training, per token."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from megatron_tied.models.config import ModelConfig
from megatron_tied.planner.activations import attention_widths
from megatron_tied.planner.layout import Recompute
from megatron_tied.planner.tensors import bank_tensors, model_tensors
from megatron_tied.topology import TieTopology


class Flops(NamedTuple):
    """Forward operations per token (a multiply-add is two): in routed experts, in shared ones, in dense MLPs, in other
    matrices, between tokens.

    Attention between tokens is causal: half of all pairs, sliding windows left aside. Tying changes none of them.
    """

    experts: int
    shared: int
    mlp: int
    dense: int
    attention: int

    @property
    def forward(self) -> int:
        """All operations of the forward pass."""
        return self.experts + self.shared + self.mlp + self.dense + self.attention

    @property
    def training(self) -> int:
        """Forward and backward, without recompute: what model FLOPs utilisation counts."""
        return 3 * self.forward


def flops_per_token(model: ModelConfig, topology: TieTopology, seq_length: int, vocab_size: int) -> Flops:
    """The operations of `model` on sequences of `seq_length` tokens. Source: 2 x weights, 2 x pairs x widths."""
    matrices: Counter[str] = Counter()
    for tensor in model_tensors(model, topology, vocab_size):
        # Followers have none of what a tie group shares beside its experts, and compute with it.
        shared = tensor.bank if tensor.expert_bank is None else None
        uses = 1 if shared is None else topology.banks[shared].size
        matrices[tensor.kind] += tensor.numel * uses if tensor.decays else 0
    dense = sum(matrices[kind] for kind in ("attention", "router", "output"))
    if model.share_embeddings_and_output_weights:
        dense += vocab_size * model.hidden_size
    expert = sum(tensor.numel for tensor in bank_tensors(model, topology.banks[0], 1)) if topology.banks else 0
    widths = attention_widths(model)
    return Flops(
        experts=2 * expert * model.moe_router_topk * len(topology.moe_layers),
        shared=2 * matrices["shared_experts"],
        mlp=2 * matrices["dense_mlp"],
        dense=2 * dense,
        attention=model.num_layers * seq_length * (widths.query + widths.output),
    )


def recomputed_share(flops: Flops, recompute: Recompute, num_layers: int) -> float:
    """Operations that recompute adds, in forward passes."""
    if recompute.method == "uniform":
        return 1.0
    if recompute.method == "block":
        return min(1.0, recompute.num_layers / num_layers)
    again = {
        "moe": flops.experts + flops.shared,
        "core_attn": flops.attention,
        "mlp": flops.mlp,
        "shared_experts": 0 if "moe" in recompute.modules else flops.shared,
    }
    return sum(operations for module, operations in again.items() if module in recompute.modules) / flops.forward
