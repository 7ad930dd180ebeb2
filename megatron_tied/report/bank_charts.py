"""The charts of tie groups and expert banks."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_tied.monitor.heat_maps import agreement_heat_maps
from megatron_tied.report.chart import Chart, Runs
from megatron_tied.report.chart_style import Drawing, of_heat_map
from megatron_tied.report.charts import Level, level_chart
from megatron_tied.report.history import RunHistory
from megatron_tied.report.line_charts import Curve, line_chart

_AGREEMENTS = {
    "top1": ("Same favourite expert", "The share of tokens whose favourite expert is the same in two layers of a bank"),
    "overlap": ("Top-k experts in common", "The share of a token's experts that two layers of a bank have in common"),
    "distinct": ("Few distinct experts", "1 where all layers of a bank use the same experts for a token, 0 where none"),
}


def tied_group_charts(runs: Runs) -> list[Chart]:
    """How far the layers of a tie group send a token to the same experts."""
    charts = [
        Chart(title, f"{reading}; a line for each tied bank, dashed: by chance.", _agreement(runs, kind))
        for kind, (title, reading) in _AGREEMENTS.items()
    ]
    tied = [(name, run) for name, run in zip(runs.names, runs.histories, strict=True) if _may_be_tied(run)]
    return [*charts, *(_matrices(name, run) for name, run in tied)]


def bank_charts(runs: Runs) -> list[Chart]:
    """The last norms, updates and gradients of every bank."""
    place = "the layers that use it" if _by_layers(runs) else "its index"
    by = f"Each bank stands over {place}, at its last value."
    of_tied = "Only tied banks have it."
    return [
        Chart("Weight norm", by, _levels(runs, "weight norm", "weight_norm")),
        Chart(
            "Update ratio",
            f"The norm of an update over that of the weights. {by}",
            _levels(runs, "update / weights", "update_ratio"),
        ),
        Chart(
            "Gradient cosine",
            f"Between the gradients of the layers of a bank; 1: they agree, below 0: they pull apart. {of_tied}",
            _levels(runs, "cosine", "gradient_cosine", "gradient_cosine_min"),
        ),
        Chart(
            "Gradient cancellation",
            f"What is lost where the layers of a bank pull apart; 0: nothing, 1: all. {of_tied}",
            _levels(runs, "cancellation", "gradient_cancellation"),
        ),
    ]


def _agreement(runs: Runs, kind: str) -> Drawing | None:
    curves: list[Curve] = []
    for bank in _banks(runs, f"agreement_{kind}"):
        curves += runs.curves(f"agreement_{kind}/{bank}", tag=f"bank {int(bank)}")
        curves += runs.curves(f"agreement_{kind}_chance/{bank}", dashed=True)
    return line_chart(runs.names, curves, "agreement", solid="a bank", dashed="by chance")


def _banks(runs: Runs, prefix: str) -> list[str]:
    names = {name for run in runs.histories for name in run.series if name.startswith(f"{prefix}/")}
    return sorted(name.partition("/")[2] for name in names)


def _may_be_tied(run: RunHistory) -> bool:
    return run.topology is None or bool(run.tied_banks)


def _matrices(name: str, run: RunHistory) -> Chart:
    table, chances = run.tables.get("agreement"), run.numbered("agreement_overlap_chance")
    layers = {str(bank): known for bank in chances if (known := run.layers_of(bank)) is not None}
    drawing = None
    if table is not None and table.content and table.content.keys() <= layers.keys():
        chance = {str(bank): point.value for bank, point in chances.items()}
        drawing = of_heat_map(agreement_heat_maps(table.content, layers, chance, table.step))
    reading = "A square is how many of the top-k experts of a token two layers have in common, as a share of k."
    return Chart(f"Agreement of pairs of layers: {name}", reading, drawing)


def _by_layers(runs: Runs) -> bool:
    """Banks of differently tied runs compare by their layers; for that all topologies must be known."""
    return all(run.topology is not None for run in runs.histories)


def _levels(runs: Runs, label: str, name: str, least: str | None = None) -> Drawing | None:
    """Of every bank a metric and, as rings, the `least` of those that it is the mean of."""
    levels = [*_bank_levels(runs, name, False), *(_bank_levels(runs, least, True) if least else ())]
    over = "layer" if _by_layers(runs) else "bank"
    return level_chart(runs.names, levels, label, over, full="mean of pairs", hollow="least pair")


def _bank_levels(runs: Runs, name: str, hollow: bool) -> Iterator[Level]:
    by_layers = _by_layers(runs)
    for run, history in enumerate(runs.histories):
        for bank, point in history.numbered(f"bank_{name}").items():
            layers = history.layers_of(bank) if by_layers else (bank,)
            if layers is not None:
                yield Level(run, layers, point.value, hollow)
