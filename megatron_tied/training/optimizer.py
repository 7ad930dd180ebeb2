"""The optimizer of a run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from megatron_tied.engine.muon import MuonAdamW
from megatron_tied.engine.parameter_groups import AdamWGroups, parameter_groups
from megatron_tied.training.optimizer_config import OptimizerConfig

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_optimizer(model: torch.nn.Module, settings: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of `model` that `settings` name, over its parameter groups."""
    if settings.name == "adamw":
        groups = parameter_groups(model, lr=settings.lr, weight_decay=settings.weight_decay)
        return adamw(groups, settings, lr=settings.lr)
    beside = AdamWGroups(settings.rate_of_adamw(), settings.adamw_weight_decay)
    groups = parameter_groups(model, lr=settings.lr, weight_decay=settings.weight_decay, beside_muon=beside)
    others = partial(adamw, settings=settings, lr=beside.lr)
    precision = _DTYPES[settings.iterate_in]
    return MuonAdamW(groups, others, lr=settings.lr, momentum=settings.momentum, precision=precision)


def adamw(groups: Sequence[dict[str, Any]], settings: OptimizerConfig, *, lr: float) -> torch.optim.AdamW:
    """AdamW over parameter groups, by PyTorch's fused kernels: CUDA's, or the CPU's for states that ZeRO offloads.

    Not by apex's FusedAdam and DeepSpeed's CPUAdam: they are compiled where they run, and the former counts steps by
    group, which a checkpoint that fits any groups cannot hold.
    """
    return torch.optim.AdamW(groups, lr=lr, betas=settings.betas, eps=settings.eps, fused=True)
