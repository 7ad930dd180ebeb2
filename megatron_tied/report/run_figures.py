"""The figures that sum a run up, as rows with a column for each run; differences are to the first run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_tied.report.figure_text import NOT_LOGGED, bank_name, number, percent, signed
from megatron_tied.report.history import RunHistory
from megatron_tied.report.history_lines import Point

_TIME_PARTS = ("data", "forward", "backward", "reduce", "optimizer", "other")
_AGREEMENTS = {"top1": "same favourite expert", "overlap": "top-k in common", "distinct": "few distinct experts"}


class Cell(NamedTuple):
    """A figure of one run, of one or more lines, and how it differs from the first run's, or nothing."""

    text: str
    difference: str = ""


class Row(NamedTuple):
    """A figure with a cell for each run."""

    label: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class RowGroup:
    """Rows under a title."""

    title: str
    rows: Sequence[Row]


_Figure = Callable[[RunHistory], str]
_Difference = Callable[[RunHistory, RunHistory], str]


def row_groups(runs: Sequence[RunHistory]) -> list[RowGroup]:
    """All rows, in the order in which people read them."""

    def row(label: str, figure: _Figure, difference: _Difference | None = None) -> Row:
        cells = [Cell(figure(run)) for run in runs]
        if difference is not None:
            cells[1:] = [
                Cell(cell.text, difference(runs[0], run)) for cell, run in zip(cells[1:], runs[1:], strict=True)
            ]
        return Row(label, cells)

    return [
        RowGroup(
            "Run",
            [
                row("topology", lambda run: run.topology_line or "not known: no readable config or summary"),
                row("steps", _steps),
                row("parameters stored", _parameters),
            ],
        ),
        RowGroup(
            "Loss",
            [
                row("training loss", _last("loss"), _loss_difference("loss")),
                row("of it lm loss", _last("lm_loss"), _loss_difference("lm_loss")),
                row("perplexity, training", _training_perplexity),
                row("validation loss, last", _last("validation_loss"), _loss_difference("validation_loss")),
                row("validation loss, best", _best, _best_difference),
                row("perplexity, validation", lambda run: _perplexity(run.last("validation_loss"))),
            ],
        ),
        RowGroup(
            "Speed and memory",
            [
                row("tokens/s (median)", _speed, _ratio(lambda run: run.settled("tokens_per_second"))),
                row("peak memory, GB", _against_plan(peak_memory, "planned_memory_gb"), _ratio(peak_memory)),
                row("weights, optimizer, GB", _against_plan(state_memory, "planned_states_gb"), _ratio(state_memory)),
                row("step time", _time_split),
            ],
        ),
        RowGroup(
            "Routing",
            [
                row("worst max_vio", _worst_violation),
                row("dead experts", _dead),
                row("router entropy", _entropies),
                row("assignments dropped", lambda run: _percent_of(run.last("routing/dropped"))),
            ],
        ),
        RowGroup("Agreement, 0 to 1", [row(label, _agreement(kind)) for kind, label in _AGREEMENTS.items()]),
        RowGroup("Banks", [row("update / weight norm", _update_ratios)]),
    ]


def peak_memory(run: RunHistory) -> float | None:
    """The last measured peak of the fullest rank that is logged, in 10^9 bytes."""
    points = [run.last(name) for name in ("memory_gb", "memory_fullest_gb")]
    return max((point.value for point in points if point and math.isfinite(point.value)), default=None)


def state_memory(run: RunHistory) -> float | None:
    """The last measured weights and optimizer states of rank 0, in 10^9 bytes."""
    return _value(run.last("states_gb"))


def time_split(run: RunHistory) -> dict[str, float]:
    """Seconds a step by part, medians of the last half; only the parts that were logged."""
    parts = {part: run.settled(f"time/{part}") for part in _TIME_PARTS}
    return {part: seconds for part, seconds in parts.items() if seconds is not None}


def _value(point: Point | None) -> float | None:
    return None if point is None else point.value


def _last(name: str) -> _Figure:
    return lambda run: number(_value(run.last(name)), ".4f")


def _steps(run: RunHistory) -> str:
    planned = run.planned_steps
    done = f"{run.last_step:,}" if planned is None else f"{run.last_step:,} of {planned:,}"
    return f"{done}, {run.state()}"


def _parameters(run: RunHistory) -> str:
    logged = [_value(run.last(f"parameters_{kind}")) for kind in ("unique", "untied")]
    counted = run.summary.get("parameters")
    if None in logged and isinstance(counted, dict):
        logged = [counted.get(kind) for kind in ("unique", "untied")]
    unique, untied = logged
    if unique is None or not untied:
        return NOT_LOGGED
    return f"{unique:,.0f} of {untied:,.0f} untied ({unique / untied:.1%})"


def _loss_difference(name: str) -> _Difference:
    """At the last step of which both runs have the loss: a run that is further on has had more steps to learn."""

    def difference(first: RunHistory, run: RunHistory) -> str:
        ours, theirs = run.finite(name), first.finite(name)
        if ours is None or theirs is None:
            return ""
        common, at_ours, at_theirs = np.intersect1d(ours.steps, theirs.steps, return_indices=True)
        if not len(common):
            return "no step in common"
        text = _difference(theirs.values[at_theirs[-1]], ours.values[at_ours[-1]])
        same = common[-1] == run.series[name].steps[-1] == first.series[name].steps[-1]
        return text if same else f"{text} at step {common[-1]:,}"

    return difference


def _difference(first: float, other: float) -> str:
    return f"{signed(other - first)}, {other / first:.3f} x" if first else signed(other - first)


def _best(run: RunHistory) -> str:
    best = run.best("validation_loss")
    return NOT_LOGGED if best is None else f"{best.value:.4f} at step {best.step:,}"


def _best_difference(first: RunHistory, run: RunHistory) -> str:
    ours, theirs = run.best("validation_loss"), first.best("validation_loss")
    return "" if ours is None or theirs is None else _difference(theirs.value, ours.value)


def _training_perplexity(run: RunHistory) -> str:
    logged = run.last("perplexity")
    return _perplexity(run.last("lm_loss")) if logged is None else number(logged.value, ",.4g")


def _perplexity(loss: Point | None) -> str:
    if loss is None:
        return NOT_LOGGED
    try:
        return number(math.exp(loss.value), ",.4g")
    except OverflowError:
        return number(math.inf)


def _speed(run: RunHistory) -> str:
    return number(run.settled("tokens_per_second"), ",.0f")


def _ratio(figure: Callable[[RunHistory], float | None]) -> _Difference:
    def difference(first: RunHistory, run: RunHistory) -> str:
        ours, theirs = figure(run), figure(first)
        return f"{ours / theirs:.3f} x" if ours is not None and theirs else ""

    return difference


def _against_plan(measured: Callable[[RunHistory], float | None], plan: str) -> _Figure:
    def figure(run: RunHistory) -> str:
        size, planned = measured(run), _value(run.last(plan))
        if size is None:
            return NOT_LOGGED
        if not planned:
            return f"{size:.3f}, no plan logged"
        return f"{size:.3f} of {planned:.3f} planned ({size / planned:.0%})"

    return figure


def _time_split(run: RunHistory) -> str:
    parts = time_split(run)
    total = sum(parts.values())
    return ", ".join(f"{part} {seconds / total:.0%}" for part, seconds in parts.items()) if total else NOT_LOGGED


def _worst_violation(run: RunHistory) -> str:
    of_layers = {layer: point.value for layer, point in run.numbered("layer_max_vio").items()}
    finite = {layer: value for layer, value in of_layers.items() if math.isfinite(value)}
    if not finite:
        return number(_value(run.last("routing/max_vio_worst")), ".2f")
    worst = max(finite, key=finite.__getitem__)
    return f"{finite[worst]:.2f} in layer {worst}"


def _dead(run: RunHistory) -> str:
    of_banks = {bank: point.value for bank, point in run.numbered("bank_dead_fraction").items()}
    if not of_banks:
        return NOT_LOGGED
    dead = {bank: value for bank, value in of_banks.items() if value > 0}
    if not dead:
        return f"none in {len(of_banks)} bank{'' if len(of_banks) == 1 else 's'}"
    worst = max(dead, key=dead.__getitem__)
    return f"{percent(dead[worst])} of bank {worst}; {len(dead)} of {len(of_banks)} banks have some"


def _entropies(run: RunHistory) -> str:
    token, mean = run.last("routing/token_entropy"), run.last("routing/mean_entropy")
    if token is None and mean is None:
        return NOT_LOGGED
    return f"{number(_value(token), '.3f')} of a token, {number(_value(mean), '.3f')} of the mean"


def _percent_of(point: Point | None) -> str:
    return NOT_LOGGED if point is None else percent(point.value)


def _agreement(kind: str) -> _Figure:
    def figure(run: RunHistory) -> str:
        points = run.numbered(f"agreement_{kind}")
        if not points:
            return "no tied bank" if run.topology is not None and not run.tied_banks else NOT_LOGGED
        chances = run.numbered(f"agreement_{kind}_chance")
        return "\n".join(
            f"{bank_name(run, bank)}: {number(point.value, '.3f')}, chance {number(_value(chances.get(bank)), '.3f')}"
            for bank, point in points.items()
        )

    return figure


def _update_ratios(run: RunHistory) -> str:
    finite = {bank: point.value for bank, point in run.numbered("bank_update_ratio").items()}
    finite = {bank: value for bank, value in finite.items() if math.isfinite(value)}
    if not finite:
        return NOT_LOGGED
    least, most = min(finite, key=finite.__getitem__), max(finite, key=finite.__getitem__)
    if least == most:
        return f"{finite[least]:.2e} (bank {least})"
    return f"{finite[least]:.2e} (bank {least}) to {finite[most]:.2e} (bank {most})"
