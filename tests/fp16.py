"""fp16 on every CPU: torch computes in it everywhere, DeepSpeed wants instructions for it."""

from __future__ import annotations

from deepspeed.accelerator import get_accelerator


def allow_fp16() -> None:
    """Let DeepSpeed train in fp16 in this process, which without such instructions is slow and no less right."""
    get_accelerator().is_fp16_supported = lambda: True
