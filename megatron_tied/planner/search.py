"""Layouts that fit, fastest first: expert parallel size, ZeRO stage, micro-batch, group size and recompute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.models.config import ModelConfig
from megatron_tied.planner.layout import Layout, Recompute
from megatron_tied.planner.plan import Plan, Subject
from megatron_tied.topology import TieConfig

RECOMPUTE = (Recompute(), Recompute(frozenset({"moe_act"})), Recompute(frozenset({"moe"})), Recompute(method="uniform"))


@dataclass(frozen=True)
class Found:
    """What a search came to: how many layouts it looked at, those that fit, fastest first, and the smallest of all."""

    considered: int
    fitting: Sequence[Plan]
    smallest: Plan | None


def search(subject: Subject, tie: TieConfig, layout: Layout, group_sizes: Sequence[int]) -> Found:
    """Plan all layouts near `layout`: the same ranks, batch, precision, tensor and pipeline parallel sizes.

    Raises ConfigError for a map of banks, which has no group size to search over.
    """
    if tie.banks is not None:
        raise ConfigError(
            Problem("tie.banks", list(tie.banks), "must be left out of a search: it varies tie.group_size")
        )
    plans = [subject.plan(tied, candidate) for tied, candidate in candidates(subject, tie, layout, group_sizes)]
    fitting = sorted((plan for plan in plans if plan.fits), key=_preference)
    return Found(len(plans), fitting, min(plans, key=lambda plan: plan.memory.total, default=None))


def recompute_choices(model: ModelConfig) -> list[Recompute]:
    """What there is to choose from for `model`: experts one by one keep their activations."""
    one_by_one = model.expert_backend == "sequential"
    return [choice for choice in RECOMPUTE if not (one_by_one and "moe_act" in choice.modules)]


def candidates(
    subject: Subject, tie: TieConfig, layout: Layout, group_sizes: Sequence[int]
) -> Iterator[tuple[TieConfig, Layout]]:
    """The valid combinations of what a search varies."""
    sequences = layout.global_batch_size // max(1, layout.data_parallel)
    experts = subject.model.num_moe_experts
    stages = (0, 1, 2, 3) if layout.precision == "fp32" else (1, 2, 3)
    for group_size in group_sizes:
        # Experts of tied banks are nothing to an untied model, unless one is asked for that is narrow.
        width = tie.num_tied_experts if group_size > 1 or tie.group_size == 1 else None
        try:
            tied = replace(tie, group_size=group_size, num_tied_experts=width)
            topology = subject.topology(tied)
        except ConfigError:
            continue  # too few layers for such groups
        for expert_parallel, stage, micro_batch, recompute in product(
            _divisors(experts), stages, _divisors(sequences), recompute_choices(subject.model)
        ):
            candidate = replace(
                layout,
                expert_parallel=expert_parallel,
                zero_stage=stage,
                micro_batch_size=micro_batch,
                recompute=recompute,
                # What hides communication costs one more bucket.
                overlap_comm=True if layout.overlap_comm is None else layout.overlap_comm,
            )
            if not any(candidate.problems(subject.model, topology)):
                yield tied, candidate


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _preference(plan: Plan) -> tuple[float, int, int, int]:
    """Faster first; among equals what recomputes less, then what sends less, then what needs less memory."""
    sent = sum(flow.wire for flow in plan.traffic)
    return plan.time.total, RECOMPUTE.index(plan.layout.recompute), sent, plan.memory.total
