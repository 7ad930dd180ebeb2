"""What dominates a plan, and which single change makes it fit or lets it run faster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from megatron_tied.errors import ConfigError
from megatron_tied.planner.layout import Layout, Recompute
from megatron_tied.planner.plan import Plan, Subject, gigabytes
from megatron_tied.planner.search import recompute_choices
from megatron_tied.topology import TieConfig

_MOST = 4


class Change(NamedTuple):
    """One change of a config, as people write it, and the plan with it."""

    text: str
    plan: Plan


def dominating(plan: Plan) -> str:
    """The largest part of a plan's memory and of its step, for people."""
    part, size = max(plan.memory.parts.items(), key=lambda item: item[1])
    work, seconds = max(plan.time.seconds.items(), key=lambda item: item[1])
    return (
        f"{part}, {gigabytes(size)} of {gigabytes(plan.memory.total)} GB; "
        f"{work}, {seconds / plan.time.total:.0%} of a step"
    )


def changes(subject: Subject, tie: TieConfig, plan: Plan) -> list[Change]:
    """Single changes worth making: to a plan that does not fit those that make it, else those that are faster."""
    found = []
    for text, tied, layout in _neighbours(tie, plan.layout, recompute_choices(subject.model)):
        try:
            changed = subject.plan(tied, layout)
        except ConfigError:
            continue
        if changed.fits and (not plan.fits or changed.time.total < 0.98 * plan.time.total):
            found.append(Change(text, changed))
    return sorted(found, key=lambda change: change.plan.time.total)[:_MOST]


def _neighbours(
    tie: TieConfig, layout: Layout, choices: Sequence[Recompute]
) -> Iterator[tuple[str, TieConfig, Layout]]:
    for stage in range(1, 4):
        if stage != layout.zero_stage:
            yield f"deepspeed.zero_optimization.stage={stage}", tie, replace(layout, zero_stage=stage)
    for factor in (2, 4, 8):
        size = layout.expert_parallel * factor
        yield f"parallel.expert_model_parallel_size={size}", tie, replace(layout, expert_parallel=size)
        if layout.expert_parallel % factor == 0:
            size = layout.expert_parallel // factor
            yield f"parallel.expert_model_parallel_size={size}", tie, replace(layout, expert_parallel=size)
        if layout.micro_batch_size % factor == 0:
            size = layout.micro_batch_size // factor
            yield f"train.micro_batch_size={size}", tie, replace(layout, micro_batch_size=size)
        size = layout.micro_batch_size * factor
        yield f"train.micro_batch_size={size}", tie, replace(layout, micro_batch_size=size)
    for recompute in choices:
        if recompute != layout.recompute:
            yield _recompute_keys(recompute, layout.recompute), tie, replace(layout, recompute=recompute)
    if tie.banks is None:
        for group_size in (2, 4, 8):
            if group_size > tie.group_size:
                yield f"tie.group_size={group_size}", replace(tie, group_size=group_size), layout
    if layout.pipeline_parallel > 1 and tie.pipeline == "align":
        yield "tie.pipeline=allreduce", replace(tie, pipeline="allreduce"), layout
    if layout.reduce_bucket_size > 50_000_000:
        smaller = replace(layout, reduce_bucket_size=50_000_000)
        yield "deepspeed.zero_optimization.reduce_bucket_size=50000000", tie, smaller
    if not layout.offload_optimizer:
        offload = replace(layout, offload_optimizer=True)
        yield "deepspeed.zero_optimization.offload_optimizer.device=cpu", tie, offload


def _recompute_keys(recompute: Recompute, before: Recompute) -> str:
    if recompute.method is not None:
        how = f"model.recompute_method={recompute.method} model.recompute_num_layers={recompute.num_layers}"
        return f"model.recompute_granularity=full {how}"
    if not recompute.modules:
        return "model.recompute_granularity=null"
    # Megatron-Core refuses what is said of layers beside what is said of modules.
    unsaid = " model.recompute_method=null model.recompute_num_layers=null" if before.method is not None else ""
    modules = ",".join(sorted(recompute.modules))
    return f"model.recompute_granularity=selective model.recompute_modules=[{modules}]{unsaid}"
