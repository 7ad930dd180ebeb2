"""ZeRO 3 settings that follow from the banks: gather each once per forward and once per backward pass."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_tied.layers.moe_layer import tied_layers


def bank_reuse_distance(model: torch.nn.Module) -> int:
    """Elements that pass between two neighbouring uses of any bank, plus one; 0 for a model without ties.

    DeepSpeed keeps a parameter gathered if it is used again within `stage3_max_reuse_distance` elements. From this
    distance on it holds a bank through its tie group; at its default of 1e9 it would also hold it, and most of a
    model, from forward to backward. What else a tie group shares is used again behind the bank, too.
    """
    layers = {layer.layer_number: layer for layer in model.modules() if isinstance(layer, TransformerLayer)}
    experts = {layer.layer_index: _elements(layer.experts) for layer in tied_layers(model)}
    other = {number - 1: _elements(layer) - experts.get(number - 1, 0) for number, layer in layers.items()}
    distances = [0]
    for layer in tied_layers(model):
        if layer.is_owner:
            for earlier, later in zip(layer.bank.layers, layer.bank.layers[1:], strict=False):
                between = sum(other[index] for index in range(earlier, later + 1))
                first = earlier if layer.topology.shares_more else earlier + 1
                between += sum(experts.get(index, 0) for index in range(first, later))
                distances.append(between + 1)
    return max(distances)


def with_bank_reuse(ds_config: dict[str, Any], model: torch.nn.Module) -> dict[str, Any]:
    """The config with `stage3_max_reuse_distance` for this model's banks, unless it names one or needs none."""
    zero = ds_config.get("zero_optimization", {})
    distance = bank_reuse_distance(model)
    if zero.get("stage") != 3 or "stage3_max_reuse_distance" in zero or distance == 0:
        return ds_config
    return {**ds_config, "zero_optimization": {**zero, "stage3_max_reuse_distance": distance}}


def _elements(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
