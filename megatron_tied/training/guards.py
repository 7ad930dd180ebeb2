"""What must not go on unnoticed: steps without finite gradients, and ranks that have come apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_tied.engine.consistency import find_differences
from megatron_tied.engine.engine import TiedMoEEngine
from megatron_tied.errors import TrainingStopped, listed
from megatron_tied.training.sections import TrainConfig


@contextmanager
def loss_scale_floor(step: int) -> Iterator[None]:
    """Turn DeepSpeed's plain exception about the smallest loss scale into a `TrainingStopped`."""
    try:
        yield
    except Exception as error:
        if "loss scale already at minimum" not in str(error):
            raise
        advice = "Use train.precision: bf16, or lower optimizer.lr or deepspeed.fp16.min_loss_scale"
        raise TrainingStopped(f"step {step}: gradients overflow at the smallest loss scale. {advice}") from error


def check_step(engine: TiedMoEEngine, step: int, settings: TrainConfig) -> str | None:
    """Called after each step; returns a line to show if its update was discarded for a gradient norm not finite.

    Raises `TrainingStopped` if `train.on_nonfinite` is "stop". The parameters are those before the step.
    """
    if engine.was_step_applied():
        return None
    if settings.precision == "fp16":
        return f"step {step}: skipped, gradients overflowed; the loss scale is now {engine.loss_scale_now():g}"
    found = f"step {step}: the gradient norm is not finite, the update was discarded"
    if settings.on_nonfinite == "stop":
        raise TrainingStopped(f"{found}. Lower optimizer.lr, or set train.on_nonfinite: skip to go on after such steps")
    return found


def check_consistency(engine: TiedMoEEngine, step: int, settings: TrainConfig) -> None:
    """Every `train.check_consistency_every` steps, raise `TrainingStopped` with the names that differ over ranks."""
    if not settings.check_consistency_every or step % settings.check_consistency_every:
        return
    if differing := find_differences(engine.module):
        raise TrainingStopped(f"step {step}: ranks that must hold the same values do not: {listed(differing)}")
