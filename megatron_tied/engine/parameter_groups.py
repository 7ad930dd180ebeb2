"""Optimizer parameter groups: weight decay, expert parallel experts, and the LR divisor of each bank."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

from megatron_tied.engine.groups import is_expert_parallel, mark_expert_parameters
from megatron_tied.layers.moe_layer import tied_layers


def parameter_groups(model: torch.nn.Module, *, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, as ZeRO with expert parallelism needs them.

    Vectors (norm gains, biases) get no weight decay, as in Megatron. A bank's group has `lr` divided by the
    bank's divisor, which it also keeps as `lr_divisor`; a scheduler that multiplies each group's initial LR keeps
    the ratio. `label` names the group in logs. Expert parallel groups carry DeepSpeed's `moe` and `name` marks.
    """
    mark_expert_parameters(model)
    divisors = {
        id(weight): layer.topology.lr_divisor(layer.bank)
        for layer in tied_layers(model)
        for weight in layer.experts.parameters()
    }
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        divisor = divisors.get(id(parameter))
        decays = parameter.dim() > 1
        label = ("dense" if divisor is None else _expert_label(divisor)) + ("" if decays else "_no_decay")
        group = groups.setdefault(
            (label, divisor or 1.0),
            {
                "name": label,
                "label": label,
                "params": [],
                "lr": lr / (divisor or 1.0),
                "lr_divisor": divisor or 1.0,
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    ordered = list(groups.values())
    if any(is_expert_parallel(parameter) for parameter in model.parameters()):
        ordered = split_params_into_different_moe_groups_for_optimizer(ordered)
    return [group for group in ordered if group["params"]]


def _expert_label(divisor: float) -> str:
    return "experts" if divisor == 1.0 else f"experts_lr_div_{divisor:.4g}"
