"""Plans as tables for people."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_tied.planner.advice import Change, dominating
from megatron_tied.planner.plan import Plan, gigabytes
from megatron_tied.planner.search import Found
from megatron_tied.planner.timing import assumptions

Row = tuple[str, Callable[[Plan], str]]

_HEAD: Sequence[Row] = (
    ("parameters", lambda plan: f"{plan.parameters.total:,}"),
    ("at work on a token", lambda plan: f"{plan.parameters.active:,}"),
    ("expert banks", lambda plan: str(len(plan.topology.banks))),
)
_SENT: Sequence[Row] = (
    ("all-to-all", lambda plan: gigabytes(plan.wire("dispatch") + plan.wire("combine"))),
    ("gradients", lambda plan: gigabytes(plan.wire("gradients"))),
    ("weights", lambda plan: gigabytes(plan.wire("weights"))),
    ("between nodes, of all", lambda plan: gigabytes(plan.between_nodes())),
)
_SPEED: Sequence[Row] = (
    ("seconds a step", lambda plan: f"{plan.time.total:.3g}"),
    ("tokens per second", lambda plan: f"{plan.tokens_per_second:,.0f}"),
    ("of the peak FLOP/s", lambda plan: f"{plan.utilisation:.0%}"),
)


def comparison(named: Sequence[tuple[str, Plan]]) -> RenderableType:
    """Plans side by side, the first of them untied, for one layout and machine."""
    plans = [plan for _, plan in named]
    first = plans[0]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for name, _ in named:
        table.add_column(name, justify="right")
    _rows(table, plans, _HEAD)
    _section(table, "memory of the fullest rank, GB")
    for part in first.memory.parts:
        if any(plan.memory.parts[part] for plan in plans):
            table.add_row(f"  {part}", *(gigabytes(plan.memory.parts[part]) for plan in plans))
    table.add_row("  total", *(gigabytes(plan.memory.total) for plan in plans), style="bold")
    available = gigabytes(first.hardware.memory)
    table.add_row(f"  fits in {available}", *(_fits(plan) for plan in plans))
    if any(plan.memory.states.host for plan in plans):
        table.add_row("  host memory per rank", *(gigabytes(plan.memory.states.host) for plan in plans))
    _section(table, "sent per rank and step, GB")
    _rows(table, plans, _SENT, indent="  ")
    _section(table, "time, by the assumptions below")
    _rows(table, plans, _SPEED, indent="  ")
    return Group(Text(layout_line(first)), Text(), table)


def layout_line(plan: Plan) -> str:
    """The layout in a line."""
    layout = plan.layout
    parallel = f"expert parallel {layout.expert_parallel}"
    for name, size in (("tensor", layout.tensor_parallel), ("pipeline", layout.pipeline_parallel)):
        parallel += f", {name} parallel {size}" if size > 1 else ""
    return (
        f"{layout.world_size:,} x {plan.hardware.name}, {parallel}, ZeRO {layout.zero_stage}, {layout.precision}; "
        f"{layout.global_batch_size:,} x {layout.seq_length:,} tokens a step, micro-batch {layout.micro_batch_size}, "
        f"accumulation {layout.accumulation}, recompute {layout.recompute}"
    )


def verdict(name: str, plan: Plan, changes: Sequence[Change]) -> RenderableType:
    """What dominates the plan called `name`, and what to change."""
    lines = [f"{name}: {plan.topology.describe()}", f"dominating: {dominating(plan)}"]
    if changes:
        lines.append("makes it fit, one change each:" if not plan.fits else "faster, one change each:")
        lines += [
            f"  {change.text}: {gigabytes(change.plan.memory.total)} GB, {change.plan.tokens_per_second:,.0f} tokens/s"
            for change in changes
        ]
    elif not plan.fits:
        lines.append("no single change makes it fit: try --search, more ranks, or offload with a smaller micro-batch")
    return Text("\n".join(lines))


def resting_on(plan: Plan) -> RenderableType:
    """The assumptions of a plan's figures."""
    return Text("\n".join(["assumptions:", *(f"  {line}" for line in assumptions(plan.hardware, plan.layout))]))


def found_table(found: Found, most: int) -> RenderableType:
    """The fastest layouts of a search."""
    if not found.fitting:
        return Text(_nothing_fits(found))
    columns = ("tie.group_size", "EP", "ZeRO", "micro-batch", "recompute", "GB", "s/step", "tokens/s", "of peak")
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for plan in found.fitting[:most]:
        layout = plan.layout
        table.add_row(
            str(plan.topology.tie.group_size),
            str(layout.expert_parallel),
            str(layout.zero_stage),
            str(layout.micro_batch_size),
            str(layout.recompute),
            gigabytes(plan.memory.total),
            f"{plan.time.total:.3g}",
            f"{plan.tokens_per_second:,.0f}",
            f"{plan.utilisation:.0%}",
        )
    overlap = json.dumps(found.fitting[0].layout.overlap_comm)
    head = (
        f"{len(found.fitting):,} of {found.considered:,} layouts fit, with "
        f"deepspeed.zero_optimization.overlap_comm={overlap}; the fastest:"
    )
    return Group(Text(head), table)


def _nothing_fits(found: Found) -> str:
    if found.smallest is None:
        return "no layout is valid: see --group-sizes, the number of experts and the global batch"
    needed = gigabytes(found.smallest.memory.total)
    return (
        f"none of {found.considered:,} layouts fits; the smallest needs {needed} GB: "
        f"tie.group_size {found.smallest.topology.tie.group_size}, {layout_line(found.smallest)}"
    )


def _rows(table: Table, plans: Sequence[Plan], rows: Sequence[Row], indent: str = "") -> None:
    for name, figure in rows:
        table.add_row(indent + name, *(figure(plan) for plan in plans))


def _section(table: Table, title: str) -> None:
    table.add_row()
    table.add_row(Text(title, style="bold"))


def _fits(plan: Plan) -> str:
    over = plan.memory.total - plan.hardware.memory
    return "yes" if plan.fits else f"no, {gigabytes(over)} over"
