"""The charts of the whole of a run: losses, speed, memory, routing."""

from __future__ import annotations

from collections.abc import Callable

from megatron_tied.monitor.heat_maps import load_heat_map
from megatron_tied.report.chart import Chart, Runs
from megatron_tied.report.chart_style import Drawing, of_heat_map, shortened
from megatron_tied.report.charts import Bar, bar_chart
from megatron_tied.report.curves import difference
from megatron_tied.report.history import RunHistory
from megatron_tied.report.line_charts import Curve, line_chart
from megatron_tied.report.run_figures import peak_memory, state_memory, time_split

_SMOOTH = "Faint: as logged; strong: the mean with the points around."


def loss_charts(runs: Runs) -> list[Chart]:
    """Training and validation loss, their differences to the first run, and the norm of the gradient."""
    # Of both it is the cross entropy that compares with the validation loss; older runs have logged it, too.
    training = [*runs.curves("lm_loss", smooth=True), *runs.curves("validation_loss", dashed=True)]
    charts = [
        Chart(
            "Cross entropy",
            f"Lower is better; training is without router losses, its start may lie above the chart. {_SMOOTH}",
            line_chart(
                runs.names, training, "cross entropy", solid="training", dashed="validation", without_start=True
            ),
        )
    ]
    if len(runs.histories) > 1:
        charts.append(
            Chart(
                f"Difference to {runs.names[0]}",
                "Above zero a run is worse than the first one at the same step.",
                _loss_differences(runs),
            )
        )
    gradient = line_chart(runs.names, runs.curves("grad_norm", smooth=True), "gradient norm", from_zero=True)
    return [*charts, Chart("Gradient norm", f"Spikes are steps that upset training. {_SMOOTH}", gradient)]


def speed_charts(runs: Runs) -> list[Chart]:
    """Tokens per second, where the time goes, and memory beside its plan."""
    speed = line_chart(runs.names, runs.curves("tokens_per_second", smooth=True), "tokens/s", from_zero=True)
    return [
        Chart("Tokens per second", f"Higher is better. {_SMOOTH}", speed),
        Chart(
            "Where the time of a step goes",
            "Each bar is a step of rank 0, medians of the last half of the run; shorter is faster.",
            bar_chart(_time_bars(runs), "seconds a step"),
        ),
        Chart(
            "Peak memory of the fullest rank",
            "The bar is what was measured, the upright mark what the planner said.",
            bar_chart(_memory_bars(runs, peak_memory, "planned_memory_gb"), "GB"),
        ),
        Chart(
            "Weights and optimizer states",
            "The bar is what rank 0 holds, the upright mark what the planner said.",
            bar_chart(_memory_bars(runs, state_memory, "planned_states_gb"), "GB"),
        ),
    ]


def routing_charts(runs: Runs) -> list[Chart]:
    """How evenly and how surely tokens are routed."""

    def pair(solid: str, dashed: str) -> list[Curve]:
        return [*runs.curves(f"routing/{solid}"), *runs.curves(f"routing/{dashed}", dashed=True)]

    charts = [
        Chart(
            "Uneven load (max_vio)",
            "How much more than the mean the busiest expert of a layer gets; 0 is even, 1 is twice the mean.",
            line_chart(
                runs.names,
                pair("max_vio", "max_vio_worst"),
                "max_vio",
                solid="mean of layers",
                dashed="worst layer",
                from_zero=True,
            ),
        ),
        Chart(
            "Entropy of the routers",
            "Of a token: 0 is a sure router, 1 an undecided one; of the mean: 1 where all experts are used alike.",
            line_chart(
                runs.names,
                pair("token_entropy", "mean_entropy"),
                "share of ln E",
                solid="of a token",
                dashed="of the mean",
            ),
        ),
        Chart(
            "Dead experts",
            "The fraction of experts that had no token for a while, mean of the layers; 0 is best.",
            line_chart(runs.names, runs.curves("routing/dead_fraction"), "fraction of experts", from_zero=True),
        ),
        Chart(
            "Dropped assignments",
            "The fraction of assignments of a token to an expert that capacity cut off; 0 is best.",
            line_chart(runs.names, runs.curves("routing/dropped"), "fraction of assignments", from_zero=True),
        ),
    ]
    return [*charts, *(_load_chart(name, run) for name, run in zip(runs.names, runs.histories, strict=True))]


def _loss_differences(runs: Runs) -> Drawing | None:
    first = runs.histories[0].finite("lm_loss")
    curves = []
    for run, history in enumerate(runs.histories[1:], start=1):
        series = history.finite("lm_loss")
        apart = difference(series, first) if first is not None and series is not None else None
        curves += [] if apart is None else [Curve(run, apart, smooth=True)]
    return line_chart(runs.names, curves, "cross entropy - first run's", zero_line=True)


def _time_bars(runs: Runs) -> list[Bar]:
    bars = []
    for run, history in enumerate(runs.histories):
        split = time_split(history)
        if seconds := sum(split.values()):
            bars.append(Bar(run, f"{shortened(runs.names[run])}: {seconds:.3g} s", split))
    return bars


def _memory_bars(runs: Runs, measured: Callable[[RunHistory], float | None], plan: str) -> list[Bar]:
    bars = []
    for run, history in enumerate(runs.histories):
        size, planned = measured(history), history.last(plan)
        if size is not None:
            beside = "" if planned is None else f" of {planned.value:.3g} planned"
            text = f"{shortened(runs.names[run])}: {size:.3g} GB{beside}"
            bars.append(Bar(run, text, {"measured": size}, None if planned is None else planned.value))
    return bars


def _load_chart(name: str, run: RunHistory) -> Chart:
    table = run.tables.get("expert_load")
    return Chart(
        f"Load of every expert: {name}",
        "A square is an expert of a layer and its tokens in multiples of the layer's mean; 1 is even, 0 is unused.",
        None if table is None else of_heat_map(load_heat_map(table.content, "layer", table.step)),
    )
