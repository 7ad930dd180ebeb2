"""Runs as one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megatron_tied.report.bank_charts import bank_charts, tied_group_charts
from megatron_tied.report.chart import Chart, Runs
from megatron_tied.report.chart_style import Drawing, Key, run_colour
from megatron_tied.report.figure_text import NOT_LOGGED, remarks, run_names
from megatron_tied.report.history import RunHistory
from megatron_tied.report.report_charts import loss_charts, routing_charts, speed_charts
from megatron_tied.report.run_figures import row_groups
from megatron_tied.report.svg import inline_svg, width_pixels

_TEMPLATE = "report.html.j2"
_SECTIONS = (
    ("loss", "Loss", loss_charts),
    ("speed", "Speed and memory", speed_charts),
    ("routing", "Routing", routing_charts),
    ("tied", "Tied groups", tied_group_charts),
    ("banks", "Banks", bank_charts),
)
# What a config has of its own in every run.
_NEVER_COMPARED = ("train.run_dir",)
_WIDE = 640  # pixels: what is wider takes the whole width of the page
_ABSENT = "(not there)"


@dataclass(frozen=True)
class DrawnChart:
    """A chart as it stands in the page; width: that of its SVG at natural size, in CSS pixels.

    wide: it takes a row of its own.
    """

    title: str
    reading: str
    svg: Markup
    width: int
    wide: bool
    keys: Sequence[Key]


@dataclass(frozen=True)
class Section:
    """A part of the page: its charts, and the titles of those that would be empty."""

    anchor: str
    title: str
    charts: Sequence[DrawnChart]
    left_out: Sequence[str]


@dataclass(frozen=True)
class ConfigDifference:
    """A key of the config that runs give different values, one for each run."""

    key: str
    values: Sequence[str]


def html_report(histories: Sequence[RunHistory]) -> str:
    """The page. All text of the runs in it is escaped."""
    names = run_names([history.directory for history in histories])
    runs = Runs(names, histories)
    loader = PackageLoader("megatron_tied.report", package_path="")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(_TEMPLATE).render(
        title=" against ".join(names) if len(names) < 3 else f"{names[0]} and {len(names) - 1} others",
        runs=[{"name": name, "colour": run_colour(run)} for run, name in enumerate(names)],
        remarks=remarks(histories),
        groups=row_groups(histories),
        not_logged=NOT_LOGGED,
        sections=[_section(anchor, title, charts(runs)) for anchor, title, charts in _SECTIONS],
        config=histories[0].config.text if len(histories) == 1 else None,
        differences=config_differences([history.config.values for history in histories]),
    )


def config_differences(configs: Sequence[Mapping[str, Any]]) -> list[ConfigDifference]:
    """The keys whose values differ between runs, dotted, in the order of the first config that has them."""
    flat = [flattened(config) for config in configs]
    keys = dict.fromkeys(key for config in flat for key in config if key not in _NEVER_COMPARED)
    rows = [ConfigDifference(key, [str(config.get(key, _ABSENT)) for config in flat]) for key in keys]
    return [row for row in rows if len(set(row.values)) > 1]


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flattened(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat


def _section(anchor: str, title: str, charts: Sequence[Chart]) -> Section:
    drawn = [
        _drawn(chart, chart.drawing, f"{anchor}{place}")
        for place, chart in enumerate(charts)
        if chart.drawing is not None
    ]
    return Section(anchor, title, drawn, [chart.title for chart in charts if chart.drawing is None])


def _drawn(chart: Chart, drawing: Drawing, name: str) -> DrawnChart:
    svg, width = Markup(inline_svg(drawing.figure, name)), width_pixels(drawing.figure)
    return DrawnChart(chart.title, chart.reading, svg, width, width > _WIDE, drawing.keys)
