"""Wrong types in the `deepspeed` section, found before a model is built.

DeepSpeed checks some sections when it makes its engine, and other keys when it first uses them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_tied.errors import Problem
from megatron_tied.training.validation import type_problem

# What DeepSpeed takes as it comes. Its other sections are refused or checked by `engine.ds_config`.
_TYPES: Mapping[str, Any] = {
    **dict.fromkeys(("disable_allgather", "disable_python_gc", "dump_state", "memory_breakdown"), bool),
    **dict.fromkeys(("wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"), bool),
    **dict.fromkeys(("steps_per_print", "vocabulary_size"), int | None),
    **dict.fromkeys(("communication_data_type", "log_level", "seq_parallel_communication_data_type"), str | None),
    **dict.fromkeys(("aio", "autotuning", "checkpoint", "data_types", "datastates_ckpt"), dict),
    **dict.fromkeys(("comet", "csv_monitor", "tensorboard", "wandb"), dict),
    **dict.fromkeys(("comms_logger", "flops_profiler", "timers"), dict),
}

# The sections that DeepSpeed checks itself, by the class that does; errors of others name theirs.
_SECTIONS = {
    "CommsLoggerConfig": "comms_logger.",
    "DeepSpeedBF16Config": "bf16.",
    "DeepSpeedFP16Config": "fp16.",
    "DeepSpeedThroughputTimerConfig": "timers.throughput.",
    "DeepSpeedZeroConfig": "zero_optimization.",
}


def deepspeed_type_problems(section: Mapping[str, Any]) -> Iterator[Problem]:
    """The keys of the first level whose value has another type than DeepSpeed assumes; loads no DeepSpeed."""
    for key in sorted(section.keys() & _TYPES.keys()):
        problem = type_problem(f"deepspeed.{key}", section[key], _TYPES[key])
        if problem and section[key] != "auto":
            yield problem


def refused_by_deepspeed(section: Mapping[str, Any]) -> list[Problem]:
    """What DeepSpeed says against the values that it checks itself: all of the first section that it refuses."""
    from deepspeed.runtime.config import DeepSpeedConfig

    # Batch sizes are checked by `engine.ds_config`; here they would have to fit the number of processes.
    batch = {"train_batch_size": None, "gradient_accumulation_steps": None, "train_micro_batch_size_per_gpu": 1}
    try:
        DeepSpeedConfig({**section, **batch})
    except ValidationError as error:
        return [_problem(item, _SECTIONS.get(error.title, "")) for item in error.errors(include_url=False)]
    except Exception as error:  # of many types, AssertionError and KeyError among them
        return [Problem("deepspeed", dict(section), f"is refused by DeepSpeed: {error}")]
    return []


def _problem(item: ErrorDetails, section: str) -> Problem:
    field = f"deepspeed.{section}{'.'.join(map(str, item['loc']))}".rstrip(".")
    valid = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return Problem(field, item["input"], valid)
