"""From a run config to what the planner asks for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.planner.hardware import Hardware
from megatron_tied.planner.layout import Layout, Recompute
from megatron_tied.planner.plan import Subject
from megatron_tied.training.config import RunConfig
from megatron_tied.training.vocabulary import vocabulary_size

# What can be planned although it cannot be trained yet.
_PLANNED_ONLY = frozenset({"parallel.pipeline_model_parallel_size", "checkpoint.save_every"})
# DeepSpeed's keys of sizes in elements, and the fields of Layout that hold them.
_SIZES = {
    "reduce_bucket_size": "reduce_bucket_size",
    "stage3_prefetch_bucket_size": "prefetch_bucket_size",
    "stage3_param_persistence_threshold": "persistence_threshold",
    "stage3_max_live_parameters": "max_live_parameters",
    "stage3_max_reuse_distance": "max_reuse_distance",
    "sub_group_size": "sub_group_size",
}


def remarks(config: RunConfig, world_size: int) -> list[Problem]:
    """What stands against training `config` but not against planning it. Raises ConfigError for everything else."""
    problems = config.problems(world_size)
    if wrong := [problem for problem in problems if problem.field not in _PLANNED_ONLY]:
        raise ConfigError(wrong)
    return problems


def planned_layout(config: RunConfig, world_size: int, **assumed: Any) -> Layout:
    """The layout of `config` on `world_size` ranks; `assumed` are fields of Layout that no config says.

    Raises ConfigError for values that DeepSpeed would refuse, and for those that the planner does not know.
    """
    train, parallel = config.train, config.parallel
    zero = config.deepspeed.get("zero_optimization", {})
    if problems := list(_zero_problems(zero, config.deepspeed)):
        raise ConfigError(problems)
    return Layout(
        world_size=world_size,
        seq_length=train.seq_length,
        micro_batch_size=train.micro_batch_size,
        global_batch_size=train.global_batch_size,
        expert_parallel=parallel.expert_model_parallel_size,
        tensor_parallel=parallel.tensor_model_parallel_size,
        pipeline_parallel=parallel.pipeline_model_parallel_size,
        precision=train.precision,
        zero_stage=_stated(zero, "stage", 1),
        recompute=Recompute.of(config.model),
        optimizer=config.optimizer.name,
        frozen=frozenset(config.frozen()),
        offload_optimizer=config.offload_device("offload_optimizer") is not None,
        offload_parameters=config.offload_device("offload_param") is not None,
        overlap_comm=_stated(zero, "overlap_comm", None),
        **{field: int(value) for key, field in _SIZES.items() if (value := _stated(zero, key, None)) is not None},
        **assumed,
    )


def _zero_problems(zero: Mapping[str, Any], deepspeed: Mapping[str, Any]) -> Iterator[Problem]:
    field = "deepspeed.zero_optimization"
    for key in _SIZES:
        value = _stated(zero, key, 1)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            yield Problem(f"{field}.{key}", value, "must be a number >= 0")
    overlap = _stated(zero, "overlap_comm", None)
    if overlap is not None and not isinstance(overlap, bool):
        yield Problem(f"{field}.overlap_comm", overlap, "must be true or false")
    for section, key in (("data_types", "grad_accum_dtype"), (None, "communication_data_type")):
        value = (deepspeed.get(section) or {}).get(key) if section else deepspeed.get(key)
        if value not in (None, "auto"):
            name = ".".join(filter(None, ("deepspeed", section, key)))
            yield Problem(name, value, "must be left out of a plan: it knows gradients as wide as weights only")


def planned_subject(config: RunConfig, hardware: Hardware) -> Subject:
    """The model of `config` on `hardware`. Raises ConfigError if nothing says how large its vocabulary is."""
    return Subject(config.model, hardware, vocabulary_size(config))


def _stated(zero: Mapping[str, Any], key: str, default: Any) -> Any:
    value = zero.get(key, default)
    return default if value == "auto" else value
