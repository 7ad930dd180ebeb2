"""Optimizer parameter groups: weight decay, expert parallel experts, and the LR divisor of each bank."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

from megatron_tied.engine.blocks import is_hidden_matrix
from megatron_tied.engine.groups import is_expert_parallel, mark_expert_parameters
from megatron_tied.engine.muon import IS_MUON
from megatron_tied.layers.moe_layer import tied_layers
from megatron_tied.layers.sharing_layer import sharing_layers


class AdamWGroups(NamedTuple):
    """What Muon leaves to AdamW, and at which rates: everything but matrices between hidden states."""

    lr: float
    weight_decay: float


def parameter_groups(
    model: torch.nn.Module, *, lr: float, weight_decay: float = 0.0, beside_muon: AdamWGroups | None = None
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, as ZeRO with expert parallelism needs them.

    Vectors (norm gains, biases) get no weight decay, as in Megatron. A bank's group has `lr` divided by the
    bank's divisor, which it also keeps as `lr_divisor`, and so have the matrices of an attention that its layers share;
    a scheduler that multiplies each group's initial LR keeps the ratio. `label` names the group in logs. Expert
    parallel groups carry DeepSpeed's `moe` and `name` marks. With `beside_muon` the groups are `MuonAdamW`'s: `lr` and
    `weight_decay` are those of hidden matrices.
    """
    mark_expert_parameters(model)
    divisors = {
        id(weight): layer.topology.lr_divisor(layer.bank)
        for layer in tied_layers(model)
        for weight in layer.experts.parameters()
    }
    # Not a shared router's, nor shared norms': "Tying the Loop" divides the rate at which Muon moves tied matrices, and
    # those are AdamW's there.
    of_attention = {
        id(weight): layer.topology.lr_divisor(layer.bank)
        for layer in sharing_layers(model)
        for weight in layer.self_attention.parameters()
        if weight.dim() > 1
    }
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        divisor = divisors.get(id(parameter)) or of_attention.get(id(parameter)) or 1.0
        is_muon = beside_muon is not None and is_hidden_matrix(name, parameter)
        if beside_muon is not None and not is_muon:
            label, rate, decay = "adamw", beside_muon.lr, beside_muon.weight_decay
        else:
            decays = parameter.dim() > 1
            kind = "experts" if id(parameter) in divisors else "dense" if divisor == 1.0 else "attention"
            label = _label(kind, divisor) + ("" if decays else "_no_decay")
            rate, decay = lr, weight_decay if decays else 0.0
        group = groups.setdefault(
            (label, divisor),
            {
                "name": label,
                "label": label,
                "params": [],
                "lr": rate / divisor,
                "lr_divisor": divisor,
                "weight_decay": decay,
                **({IS_MUON: is_muon} if beside_muon is not None else {}),
            },
        )
        group["params"].append(parameter)
    ordered = list(groups.values())
    if any(is_expert_parallel(parameter) for parameter in model.parameters()):
        ordered = split_params_into_different_moe_groups_for_optimizer(ordered)
    return [group for group in ordered if group["params"]]


def _label(kind: str, divisor: float) -> str:
    return kind if divisor == 1.0 else f"{kind}_lr_div_{divisor:.4g}"
