"""The learning rate over the steps of a run."""

from __future__ import annotations

import math

import torch

from megatron_tied.training.optimizer_config import OptimizerConfig


def lr_factor(step: int, steps: int, optimizer: OptimizerConfig) -> float:
    """What the peak learning rates are multiplied by in `step`, counted from 0.

    A linear warm-up that reaches 1 in its last step, then what `schedule` says, which would reach `min_lr / lr` one
    step after the run: no step is spent at a learning rate of 0.
    """
    if step < optimizer.warmup_steps:
        return (step + 1) / optimizer.warmup_steps
    floor = optimizer.min_lr / optimizer.lr
    begin = steps - optimizer.decay_steps if optimizer.schedule == "wsd" else optimizer.warmup_steps
    progress = min(1.0, max(0.0, (step - begin) / max(1, steps - begin)))
    match optimizer.schedule:
        case "constant":
            return 1.0
        case "cosine":
            left = 0.5 * (1.0 + math.cos(math.pi * progress))
        case "linear" | "wsd":
            left = 1.0 - progress
    return floor + (1.0 - floor) * left


def go_to(schedule: torch.optim.lr_scheduler.LambdaLR, step: int) -> None:
    """Set every group's learning rate to what it is after `step` steps of the schedule."""
    schedule.last_epoch = step
    schedule._last_lr = [
        base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = rate


def lr_schedule(
    optimizer: torch.optim.Optimizer, steps: int, config: OptimizerConfig
) -> torch.optim.lr_scheduler.LambdaLR:
    """Multiplies every group's initial learning rate by the same factor, so that LR divisors are kept."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, steps, config))
