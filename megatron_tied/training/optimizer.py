"""The optimizer of a run."""

from __future__ import annotations

from typing import Any

import torch

from megatron_tied.training.config import OptimizerConfig


def adamw(groups: list[dict[str, Any]], settings: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over parameter groups, in few kernels: on CUDA PyTorch sees to that itself, on a CPU when asked."""
    fused = not torch.cuda.is_available() or None
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=fused)
