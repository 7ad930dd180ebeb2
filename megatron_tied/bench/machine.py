"""On what a benchmark ran: figures of another machine, or of other versions, are other figures."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import psutil
import torch

from megatron_tied.bench.results import Hardware

_PACKAGES = ("megatron-tied", "torch", "megatron-core", "deepspeed", "transformers", "transformer-engine")
_CPU = Path("/proc/cpuinfo")


def software() -> dict[str, str]:
    """Versions, of what is installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def hardware() -> Hardware:
    """The host, its processors and GPUs; memory in bytes."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": psutil.virtual_memory().total,
        "gpus": gpus,
    }


def _processor() -> str:
    with suppress(OSError):
        for line in _CPU.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
