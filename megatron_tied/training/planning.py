"""From a run config to what the planner asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.planner.hardware import Hardware
from megatron_tied.planner.layout import Layout, Recompute
from megatron_tied.planner.plan import Subject
from megatron_tied.planner.tensors import LatentSizes, is_latent
from megatron_tied.training.config import RunConfig

# What can be planned although it cannot be trained yet.
_PLANNED_ONLY = frozenset({"parallel.pipeline_model_parallel_size", "model.multi_latent_attention"})
_OF_LATENT_ATTENTION = frozenset(f"model.{name}" for name in LatentSizes._fields)


def remarks(config: RunConfig, world_size: int) -> list[Problem]:
    """What stands against training `config` but not against planning it. Raises ConfigError for everything else."""
    problems = config.problems(world_size)
    if is_latent(config.model):
        problems = [problem for problem in problems if problem.field not in _OF_LATENT_ATTENTION]
    if wrong := [problem for problem in problems if problem.field not in _PLANNED_ONLY]:
        raise ConfigError(wrong)
    return problems


def planned_layout(config: RunConfig, world_size: int, **assumed: Any) -> Layout:
    """The layout of `config` on `world_size` ranks; `assumed` are fields of Layout that no config says."""
    train, parallel = config.train, config.parallel
    zero = config.deepspeed.get("zero_optimization", {})
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
        offload_optimizer=_offloads(zero, "offload_optimizer"),
        offload_parameters=_offloads(zero, "offload_param"),
        overlap_comm=_stated(zero, "overlap_comm", None),
        reduce_bucket_size=int(_stated(zero, "reduce_bucket_size", Layout.reduce_bucket_size)),
        prefetch_bucket_size=int(_stated(zero, "stage3_prefetch_bucket_size", Layout.prefetch_bucket_size)),
        persistence_threshold=int(_stated(zero, "stage3_param_persistence_threshold", Layout.persistence_threshold)),
        **assumed,
    )


def planned_subject(config: RunConfig, hardware: Hardware) -> Subject:
    """The model of `config` on `hardware`. Raises ConfigError if nothing says how large its vocabulary is."""
    vocab_size = config.model.vocab_size
    if vocab_size is None and config.data.tokenizer is not None:
        from megatron_tied.data.tokenizer import SentencePieceTokenizer

        vocab_size = SentencePieceTokenizer.load(config.data.tokenizer, field="data.tokenizer").vocab_size
    return Subject(config.model, hardware, vocab_size)


def _stated(zero: Mapping[str, Any], key: str, default: Any) -> Any:
    value = zero.get(key, default)
    return default if value == "auto" else value


def _offloads(zero: Mapping[str, Any], key: str) -> bool:
    section = zero.get(key)
    return isinstance(section, Mapping) and section.get("device", "none") != "none"
