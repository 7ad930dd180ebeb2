"""`summary.json`: what a finished run was and came to."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_tied.files import write_whole
from megatron_tied.layers.moe_layer import tied_layers
from megatron_tied.layers.sharing_layer import sharing_layers
from megatron_tied.layers.tensor_parallel import whole_shape
from megatron_tied.topology import TieTopology


def parameter_figures(model: torch.nn.Module, topology: TieTopology) -> dict[str, int]:
    """Parameters of the whole model over all ranks, counted from the built modules, and their bytes.

    `unique` is what is stored; `untied` what there would be if every layer had all that it uses to itself. To be called
    before ZeRO 3 partitions the parameters.
    """
    expert_parallel = parallel_state.get_expert_model_parallel_world_size()
    experts = {id(weight) for layer in tied_layers(model) for weight in layer.experts.parameters()}
    unique = sum(
        parameter.numel() * expert_parallel if id(parameter) in experts else whole_shape(parameter).numel()
        for parameter in model.parameters()
    )
    followers = sum(
        weight.numel() * expert_parallel
        for layer in tied_layers(model)
        if not layer.is_owner
        for weight in layer.experts.parameters()
    )
    followers += sum(
        whole_shape(weight).numel()
        for layer in sharing_layers(model)
        if not layer.is_owner
        for own, owner in layer.shared()
        for weight, shared in zip(own.parameters(), owner.parameters(), strict=True)
        if weight is shared
    )
    size = next(model.parameters()).element_size()
    return {
        "unique": unique,
        "untied": unique + followers,
        "unique_bytes": unique * size,
        "untied_bytes": (unique + followers) * size,
        "banks": len(topology.banks),
        "moe_layers": len(topology.moe_layers),
    }


def overall(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """Those that are not of a single layer or bank, whose names end in its number."""
    return {name: value for name, value in metrics.items() if not name.rpartition("/")[2].isdigit()}


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Write `summary` as JSON, atomically: a run with this file has finished. JSON has no NaN, which becomes null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in summary.items()
    }
    write_whole(path, json.dumps(finite, indent=2, allow_nan=False) + "\n")
