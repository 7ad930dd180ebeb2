"""A model of a few thousand parameters that has everything: prelude, two tie groups, both router losses."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from megatron_tied import ModelConfig, TieConfig, build_gpt_model

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

TIE = TieConfig(banks=[0, 1, 1, 1, 2, 2])
FIELDS: dict[str, Any] = {
    "num_layers": 6,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "num_moe_experts": 8,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 16,
    "vocab_size": 64,
    "qk_layernorm": True,
    "moe_aux_loss_coeff": 0.01,
    "moe_z_loss_coeff": 0.001,
    "init_method_std": 0.1,
}


def model_config(**changes: Any) -> ModelConfig:
    """The tiny model's config, with `changes` to its fields."""
    return ModelConfig.resolve({**FIELDS, **changes})


def build(tie: TieConfig = TIE, *, seed: int = 1, precision: str = "fp32", **changes: Any) -> GPTModel:
    """The tiny model, with `changes` to its fields."""
    return build_gpt_model(model_config(**changes), tie, seed=seed, precision=precision)


def inputs(sequences: int = 2, length: int = 8, seed: int = 0) -> Inputs:
    """Random (tokens, positions, attention mask, labels) as GPTModel takes them."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(FIELDS["vocab_size"], (sequences, length + 1), generator=generator)
    mask = torch.ones(length, length).triu(1).bool()[None, None]
    return rows[:, :-1].contiguous(), torch.arange(length).expand(sequences, length), mask, rows[:, 1:].contiguous()


def loss(model: torch.nn.Module, batch: Inputs) -> torch.Tensor:
    """Mean cross entropy per token, by a model or an engine."""
    tokens, positions, mask, labels = batch
    return model(tokens, positions, mask, labels=labels).float().mean()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter's gradient."""
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
