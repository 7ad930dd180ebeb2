"""Prepares this process for Megatron-Core and DeepSpeed on the host at hand, with or without CUDA."""

from __future__ import annotations

import ctypes
import os
from functools import cache

import torch

from megatron_tied.platform import no_transformer_engine
from megatron_tied.platform.quiet import silence_third_parties
from megatron_tied.platform.versions import check_versions

# Parameters of the C library's mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_BLOCK = 1 << 30


def device() -> torch.device:
    """The device this process trains on: its current CUDA device, or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@cache
def prepare() -> None:
    """Check versions, silence noise, and install the shims for what is absent: CUDA, Transformer Engine.

    Every module of this package that imports Megatron-Core calls it first. Raises `ConfigError` on an
    unsupported version.
    """
    check_versions()
    silence_third_parties()
    if not torch.cuda.is_available():
        # DeepSpeed would otherwise probe every accelerator and warn that it found none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        from megatron_tied.platform import cpu

        cpu.install_shims()
    if no_transformer_engine.is_needed():
        no_transformer_engine.install_shims()


def reuse_large_blocks() -> None:
    """On a CPU host, have large tensors take memory that this process has used before.

    The C library gives blocks of more than 32 MB back when they are freed, and asks for new ones, whose every page the
    system fills with zeros: a bank's gradient then takes longer to come by than to compute
    (examples/benchmarks/weight_gradient.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Some versions refuse more than 32 MB; and any threshold that is set ends their own adjusting of both.
    if not torch.cuda.is_available() and mallopt is not None and mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK):
        mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_BLOCK - 1)


def ranks_on_this_host() -> int:
    """How many ranks the launcher has started here; 1 without a launcher."""
    # The deepspeed launcher and torchrun name it differently.
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)


def share_host_threads(processes: int) -> None:
    """Divide the CPU's threads between this host's `processes`, unless OMP_NUM_THREADS already says how many.

    Each process would otherwise start a thread for every core, and they would wait for each other.
    """
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
