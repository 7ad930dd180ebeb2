"""How much memory there is, and whether a conversion's computations fit."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from megatron_tied.convert.sources import WeightSource
from megatron_tied.convert.tensors import KINDS, count, entries, expert_shape
from megatron_tied.platform import device

_FLOAT32 = 4
# Of a model's weights in float32: what loading and computing need beside them.
_OVERHEAD = 1.5

_CGROUP = Path("/sys/fs/cgroup")


def outside_experts(source: WeightSource) -> int:
    """Bytes in float32 of all that is no routed expert."""
    return _FLOAT32 * sum(count(entry.shape) for entry in entries(source.config, source.topology))


def experts_of(source: WeightSource, layer: int) -> int:
    """Bytes in float32 of the routed experts that `layer` uses."""
    return _FLOAT32 * sum(count(expert_shape(source.config, source.topology, layer, kind)) for kind in KINDS)


def lacking_memory(source: WeightSource) -> str | None:
    """Why there is not enough memory to build the model of `source` with all layers' experts; None if there is."""
    whole = outside_experts(source) + sum(experts_of(source, layer) for layer in source.topology.moe_layers)
    return shortage(int(whole * _OVERHEAD))


def shortage(needed: int) -> str | None:
    """Why `needed` bytes are too many; None if they are there, where models compute."""
    available = torch.cuda.mem_get_info()[0] if device().type == "cuda" else _available_memory()
    if needed <= available:
        return None
    return f"it needs some {needed / 1e9:,.1f} GB of memory and {available / 1e9:,.1f} GB are available"


def _available_memory() -> int:
    """Of this machine, or of this container where that is less."""
    available: int = psutil.virtual_memory().available
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return min(available, int(limit) - int(used)) if limit != "max" else available
    except (OSError, ValueError):
        return available
