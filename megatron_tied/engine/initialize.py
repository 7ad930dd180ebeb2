"""`initialize`: what `deepspeed.initialize` is to other models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config
from deepspeed.runtime.zero import partition_parameters
from megatron.core import parallel_state

from megatron_tied.engine.ds_config import engine_problems
from megatron_tied.engine.engine import TiedMoEEngine
from megatron_tied.engine.groups import (
    initialize_model_parallel,
    is_expert_parallel,
    model_parallel_unit,
    register_with_deepspeed,
    start_distributed,
)
from megatron_tied.engine.locations import locate_matrices
from megatron_tied.engine.muon import MuonAdamW
from megatron_tied.engine.parameter_groups import parameter_groups
from megatron_tied.engine.precision import precision_problem
from megatron_tied.engine.tensor_parallel import sum_partial_gradients
from megatron_tied.engine.zero3 import with_bank_reuse
from megatron_tied.errors import ConfigError, Problem
from megatron_tied.layers.moe_layer import TiedMoELayer, tied_layers
from megatron_tied.layers.sharing_layer import SharingLayer, sharing_layers
from megatron_tied.layers.tensor_parallel import mark_tensor_parallel

OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


def initialize(
    model: torch.nn.Module,
    config: Mapping[str, Any] | str | Path,
    optimizer: torch.optim.Optimizer | OptimizerFactory | None = None,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | SchedulerFactory | None = None,
    training_data: torch.utils.data.Dataset[Any] | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
) -> tuple[TiedMoEEngine, Any, Any, Any]:
    """Wrap a model with tied experts for training; returns (engine, optimizer, dataloader, lr_scheduler).

    `config` is a DeepSpeed config, as a mapping or a JSON file. `optimizer` is a torch optimizer built from
    `parameter_groups(model)`, a function from such groups to an optimizer, or None for the one that `config`
    names. Megatron-Core's process groups must exist if expert or tensor parallelism is wanted; otherwise they are
    made with sizes of 1. Raises `ConfigError` for an optimizer without the groups ZeRO needs and for
    DeepSpeed options that would be wrong here without an error, and `RuntimeError` if a tie has come apart since the
    model was built.
    """
    start_distributed()
    if not parallel_state.model_parallel_is_initialized():
        initialize_model_parallel()
    layers: list[TiedMoELayer | SharingLayer] = [*tied_layers(model), *sharing_layers(model)]
    for layer in layers:
        layer.check_tied()
    ds_config = dict(config) if isinstance(config, Mapping) else load_ds_config(str(config))
    _check_config(ds_config)
    ds_config = with_bank_reuse(ds_config, model)
    register_with_deepspeed()
    mark_tensor_parallel(model)
    sum_partial_gradients(model)
    lr, weight_decay = _optimizer_defaults(ds_config)
    groups = parameter_groups(model, lr=lr, weight_decay=weight_decay)
    if isinstance(optimizer, torch.optim.Optimizer):
        _check_groups(optimizer)
    # What deepspeed.initialize does around the engine it makes: it cannot be told to make another class.
    partition_parameters.shutdown_init_context()
    engine = TiedMoEEngine(
        args=None,
        model=model,
        optimizer=optimizer,
        model_parameters=groups,
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        collate_fn=collate_fn,
        mpu=model_parallel_unit(),
        config=ds_config,
        config_class=DeepSpeedConfig(ds_config, mpu=model_parallel_unit()),
    )
    partition_parameters.restore_init_context()
    if isinstance(engine.basic_optimizer, MuonAdamW):
        locate_matrices(engine, engine.basic_optimizer)
    engine._configure_python_gc()
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _optimizer_defaults(ds_config: Mapping[str, Any]) -> tuple[float, float]:
    """The learning rate and weight decay of the optimizer that `ds_config` names."""
    params = ds_config.get("optimizer", {}).get("params", {})
    return params.get("lr", 1e-3), params.get("weight_decay", 0.0)


def _check_config(ds_config: Mapping[str, Any]) -> None:
    half = [name for name in ("bf16", "fp16") if ds_config.get(name, {}).get("enabled") is True]
    sizes = (
        parallel_state.get_expert_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    problems = list(engine_problems(ds_config, precision=half[0] if half else "fp32", sharded=max(sizes) > 1))
    problems += filter(None, (precision_problem(name, f"deepspeed.{name}.enabled", True) for name in half))
    if problems:
        raise ConfigError(problems)


def _check_groups(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        if any(is_expert_parallel(weight) for weight in group["params"]) and not group.get("moe"):
            valid = "experts need groups of their own: build it from megatron_tied.parameter_groups(model)"
            raise ConfigError(Problem("optimizer", type(optimizer).__name__, valid))
