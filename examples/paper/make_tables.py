"""Turns the run directories of grids into the paper's tables, and curves:

    python examples/paper/make_tables.py runs/paper --output DIR

Writes DIR/tables.md, with a table for each family of rows (olmoe-tiny, ablation's fine, ...), and DIR/FAMILY.png. A
directory is a row's if it is called NAME-seedN and its last step is done; without that, or without a held-out loss that
is finite, it is named and left out. Differences are to the family's first row that ties nothing (g1, untied), seed by
seed, with a 95 % interval over the seeds by Student's t.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import numpy as np
from description import VARIANTS
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats

from megatron_tied.bad_input import BAD_INPUT, tell
from megatron_tied.errors import ConfigError, Problem
from megatron_tied.files import write_whole
from megatron_tied.report.history_lines import Lines, Series, read_lines
from megatron_tied.run_directory import METRICS, SUMMARY

BASELINES = ("g1", "untied")
NOTHING = "-"
_RUN = re.compile(r"(?P<name>.+)-seed(?P<seed>\d+)")
_BYTES_PER_PARAMETER = 16  # bf16 weights and gradients, fp32 masters, two moments: as the paper counts


@dataclass(frozen=True)
class FinishedRun:
    """One training of a row."""

    seed: int
    summary: Mapping[str, Any]
    lines: Lines

    def settled(self, metric: str) -> float:
        """The median of the last half of a metric; NaN if it was not logged."""
        series = self.lines.series.get(metric)
        return float("nan") if series is None else series.settled()

    def mean_of(self, prefix: str) -> float:
        """The mean over layers or banks of a metric's last values; NaN if there are none."""
        last = [series.values[-1] for name, series in self.lines.series.items() if name.startswith(f"{prefix}/")]
        return float(np.mean(last)) if last else float("nan")


@dataclass(frozen=True)
class TableRow:
    """A variant of a family, with a run for each seed."""

    family: str
    variant: str
    runs: Sequence[FinishedRun]

    @cached_property
    def losses(self) -> dict[int, float]:
        """The last held-out loss, by seed."""
        return {run.seed: run.summary["validation_loss"] for run in self.runs}

    @property
    def parameters(self) -> int:
        """How many are stored."""
        return self.runs[0].summary["parameters"]["unique"]

    def mean(self, figure: Callable[[FinishedRun], float]) -> float:
        """Over the seeds."""
        return float(np.mean([figure(run) for run in self.runs]))


def split_name(name: str) -> tuple[str, str]:
    """The family of a row and which variant of it the row is."""
    for variant in sorted(VARIANTS, key=len, reverse=True):
        if name == variant or name.endswith(f"-{variant}"):
            return name.removesuffix(variant).removesuffix("-") or "miniature", variant
    family, _, variant = name.partition("-")
    return family, variant


def read_rows(directory: Path) -> tuple[list[TableRow], list[str]]:
    """The rows of finished runs, in the order of their names, and the names of runs that have no figures."""
    runs: dict[str, list[FinishedRun]] = defaultdict(list)
    left_out = []
    for path in sorted(directory.iterdir()):
        if not path.is_dir() or (match := _RUN.fullmatch(path.name)) is None:
            continue
        if (run := _finished(path, int(match["seed"]))) is None:
            left_out.append(path.name)
        else:
            runs[match["name"]].append(run)
    if not runs:
        valid = "must hold directories NAME-seedN of runs that have finished, with held-out losses"
        raise ConfigError(Problem("RUNS", str(directory), valid))
    return [TableRow(*split_name(name), sorted(of, key=lambda run: run.seed)) for name, of in runs.items()], left_out


def _finished(path: Path, seed: int) -> FinishedRun | None:
    if not (path / SUMMARY).exists():
        return None
    summary = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
    # null: the run has diverged.
    if summary.get("validation_loss") is None:
        return None
    return FinishedRun(seed, summary, read_lines(path / METRICS))


def families(rows: Iterable[TableRow]) -> dict[str, list[TableRow]]:
    """Rows by family, what ties nothing first, then in the order in which the paper has variants."""
    order = [*BASELINES, *VARIANTS]
    found: dict[str, list[TableRow]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: order.index(row.variant) if row.variant in order else len(order)):
        found[row.family].append(row)
    return found


def difference(row: TableRow, baseline: TableRow) -> str:
    """The mean over common seeds of how much larger the row's loss is, and the 95 % interval of that mean."""
    common = [row.losses[seed] - baseline.losses[seed] for seed in row.losses.keys() & baseline.losses.keys()]
    if not common:
        return NOTHING
    mean = float(np.mean(common))
    if len(common) == 1:
        return f"{mean:+.4f} (one seed)"
    half = float(stats.t.ppf(0.975, len(common) - 1) * stats.sem(common))
    is_clear = abs(mean) > half
    return f"{mean:+.4f} ± {half:.4f}{'' if is_clear else ' (n. s.)'}"


def table(rows: Sequence[TableRow]) -> str:
    """A family's table, as Markdown."""
    baseline = rows[0] if rows[0].variant in BASELINES else None
    head = ("row", "parameters", f"states at {_BYTES_PER_PARAMETER} B", "seeds", "held-out loss", "difference")
    head += ("same favourite (chance)", "top-k in common (chance)", "tokens/s", "states measured")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        losses = list(row.losses.values())
        spread = f" ± {np.std(losses, ddof=1):.4f}" if len(losses) > 1 else ""
        cells = (
            row.variant,
            f"{row.parameters:,}",
            f"{row.parameters * _BYTES_PER_PARAMETER / 1e9:,.3f} GB",
            str(len(losses)),
            f"{np.mean(losses):.4f}{spread}",
            NOTHING if baseline is None or row is baseline else difference(row, baseline),
            _agreement(row, "top1"),
            _agreement(row, "overlap"),
            _speed(row, baseline),
            f"{row.mean(lambda run: run.summary.get('states_gb', float('nan'))):,.3f} GB",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _agreement(row: TableRow, form: str) -> str:
    found, chance = (row.mean(lambda run, name=f"agreement_{form}{end}": run.mean_of(name)) for end in ("", "_chance"))
    return NOTHING if np.isnan(found) else f"{found:.3f} ({chance:.3f})"


def _speed(row: TableRow, baseline: TableRow | None) -> str:
    speed = row.mean(lambda run: run.settled("tokens_per_second"))
    if baseline is None or row is baseline:
        return f"{speed:,.0f}"
    return f"{speed / baseline.mean(lambda run: run.settled('tokens_per_second')):.2f}x"


def plot(rows: Sequence[TableRow]) -> Figure:
    """Held-out losses over tokens, each a mean over seeds with their range, and the last over stored parameters."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curves, scatter = figure.subplots(1, 2)
    for row in rows:
        tokens, losses = _curves(row)
        (line,) = curves.plot(tokens, losses.mean(axis=0), marker=".", label=row.variant)
        curves.fill_between(tokens, losses.min(axis=0), losses.max(axis=0), alpha=0.2, color=line.get_color())
        last = list(row.losses.values())
        spread = np.std(last, ddof=1) if len(last) > 1 else None
        scatter.errorbar(row.parameters / 1e6, np.mean(last), yerr=spread, fmt="o", capsize=3, label=row.variant)
    curves.set(xlabel="tokens", ylabel="held-out loss", title="mean and range over seeds")
    scatter.set(xlabel="million parameters stored", ylabel="last held-out loss", title="mean and standard deviation")
    for axes in (curves, scatter):
        axes.grid(alpha=0.3)
    curves.legend()
    return figure


def _curves(row: TableRow) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Tokens [evaluations] of those that all seeds have, and held-out losses [seeds, evaluations]."""
    series: list[Series] = [run.lines.series["validation_loss"] for run in row.runs]
    steps = reduce(np.intersect1d, (one.steps for one in series))
    summary = row.runs[0].summary
    losses = [one.values[np.isin(one.steps, steps)] for one in series]
    return steps * (summary["tokens"] / summary["steps"]), np.stack(losses)


def main(argv: Sequence[str] | None = None) -> int:
    """Write tables and plots; returns the exit code, 2 where there is no finished run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="where run_grid.py put the run directories")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(argv)
    try:
        if not arguments.runs.is_dir():
            raise ConfigError(Problem("RUNS", str(arguments.runs), "must be a directory"))
        rows, left_out = read_rows(arguments.runs)
    except ConfigError as error:
        tell(error, sys.stderr)
        return BAD_INPUT
    arguments.output.mkdir(parents=True, exist_ok=True)
    texts = []
    for family, of_family in families(rows).items():
        plot(of_family).savefig(arguments.output / f"{family}.png", dpi=120)
        texts.append(f"## {family}\n\n{table(of_family)}\n")
    write_whole(arguments.output / "tables.md", "\n".join(texts))
    print(f"{sum(len(row.runs) for row in rows)} runs in {arguments.output / 'tables.md'}")
    if left_out:
        print(f"left out, not finished or without a held-out loss: {', '.join(left_out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
