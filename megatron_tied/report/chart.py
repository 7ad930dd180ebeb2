"""A chart with its words, and the runs that charts are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_tied.report.chart_style import Drawing
from megatron_tied.report.history import RunHistory
from megatron_tied.report.line_charts import Curve


@dataclass(frozen=True)
class Chart:
    """A chart, or None in its place if the runs have not logged what it shows. reading: how to read it, a sentence."""

    title: str
    reading: str
    drawing: Drawing | None


@dataclass(frozen=True)
class Runs:
    """The runs of a report, and what they are called."""

    names: Sequence[str]
    histories: Sequence[RunHistory]

    def curves(self, metric: str, *, dashed: bool = False, smooth: bool = False, tag: str = "") -> list[Curve]:
        """A metric over the steps, of every run that has logged it."""
        return [
            Curve(run, history.series[metric], dashed, smooth, tag)
            for run, history in enumerate(self.histories)
            if metric in history.series
        ]
