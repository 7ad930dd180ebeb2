"""Prepares this process for Megatron's own training, which assumes CUDA in more places than its layers do."""

from __future__ import annotations

from functools import cache

import torch

from megatron_tied.platform.host import prepare


@cache
def prepare_training() -> None:
    """`prepare`, and on a host without CUDA what Megatron's optimizers and `megatron.training` need there.

    To be called before `megatron.training` is imported.
    """
    prepare()
    if not torch.cuda.is_available():
        from megatron_tied.platform import cpu_training

        cpu_training.install_shims()
