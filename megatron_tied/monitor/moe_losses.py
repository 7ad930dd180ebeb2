"""The routers' auxiliary losses of one step, read from Megatron-Core's tracker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import (
    clear_aux_losses_tracker,
    get_moe_layer_wise_logging_tracker,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_tied.platform import device

_TRACKED = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}


@dataclass(frozen=True)
class MoELosses:
    """Means over MoE layers, micro-batches and data parallel ranks.

    aux_loss: load-balancing loss without its coefficient, E x sum f_e P_e; 1 is perfectly even.
    z_loss: mean squared logsumexp of the router's logits, without its coefficient.
    objective: what both add to the training loss, summed over layers, with their coefficients.
    """

    aux_loss: float
    z_loss: float
    objective: float


def take_moe_losses(config: TransformerConfig, moe_layers: int, micro_batches: int) -> MoELosses:
    """The losses tracked since the last call, which are forgotten; a collective over data and tensor parallel ranks.

    `micro_batches` is how many this rank has run since then. Source: `track_moe_metrics` of Megatron-Core, which
    reduces with an operation that gloo lacks and does not average the z-loss over ranks.
    """
    balancing = _coefficients(config)
    names = [_TRACKED[kind] for kind in balancing] + ["z_loss"]
    tracker = get_moe_layer_wise_logging_tracker()
    sums = torch.stack([_layer_sum(tracker.get(name)) for name in names])
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    torch.distributed.all_reduce(sums, group=group)
    clear_aux_losses_tracker()
    *balancing_sums, z_sum = (sums / (group.size() * micro_batches)).tolist()
    weighted = [total * coefficient for total, coefficient in zip(balancing_sums, balancing.values(), strict=True)]
    return MoELosses(
        aux_loss=sum(balancing_sums) / moe_layers,
        z_loss=z_sum / moe_layers,
        objective=sum(weighted) + z_sum * (config.moe_z_loss_coeff or 0.0),
    )


def _coefficients(config: TransformerConfig) -> dict[str, float]:
    kinds, coefficients = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    pairs = zip(kinds, coefficients, strict=True) if isinstance(kinds, list) else [(kinds, coefficients)]
    return {kind: coefficient for kind, coefficient in pairs if kind in _TRACKED and coefficient}


def _layer_sum(entry: Mapping[str, Any] | None) -> torch.Tensor:
    if entry is None:
        return torch.zeros((), device=device())
    values: torch.Tensor = entry["values"].sum()
    # Tensor and context parallel ranks have parts of one balancing loss, but a z-loss each.
    if entry.get("reduce_group") is not None:
        torch.distributed.all_reduce(values, group=parallel_state.get_tensor_and_context_parallel_group())
    return values.to(device())
