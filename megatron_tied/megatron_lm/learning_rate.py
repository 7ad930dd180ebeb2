"""The learning rates of tied banks, in the form in which Megatron-Core's optimizers take exceptions."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.optimizer_config import OptimizerConfig, ParamKey, ParamPredicate

from megatron_tied.topology import TieTopology


def bank_learning_rates(config: OptimizerConfig, topology: TieTopology) -> dict[ParamKey, dict[str, Any]]:
    """`config_overrides` for `get_megatron_optimizer`: the highest and lowest rate of tied banks, divided.

    To be merged with the standard ones; the model must have gone through `tie_experts`. A warm-up that does not begin
    at 0 begins at the same rate for every group: Megatron-Core has one `lr_warmup_init`.
    """
    divisors = {topology.lr_divisor(bank) for bank in topology.banks} - {1.0}
    return {_key(divisor): _divided(config, divisor) for divisor in sorted(divisors)}


def _key(divisor: float) -> ParamKey:
    def has_divisor(weight: torch.nn.Parameter) -> bool:
        return getattr(weight, "bank_lr_divisor", 1.0) == divisor

    return ParamKey(predicate=ParamPredicate(name=f"bank_lr_divided_by_{divisor:g}", fn=has_divisor))


def _divided(config: OptimizerConfig, divisor: float) -> dict[str, Any]:
    rates = {"max_lr": config.lr, "min_lr": config.min_lr}
    divided = {name: rate / divisor for name, rate in rates.items() if rate is not None}
    # No scheduler multiplies by it. A checkpoint tells groups apart by it, and would else mix up the banks' rates.
    return {**divided, "lr_mult": 1.0 / divisor}
