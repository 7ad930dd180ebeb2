"""The rows that sum runs up: known numbers in, the words that people read out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megatron_tied.report.figure_text import percent, run_names
from megatron_tied.report.history import RunHistory, read_history
from megatron_tied.report.run_figures import Cell, row_groups
from megatron_tied.topology import TieConfig
from tests.report.synthetic_runs import TIED, UNTIED, topology_of, write_config, write_lines


def run(directory: Path, *lines: dict[str, Any], tie: TieConfig | None = None) -> RunHistory:
    if tie is not None:
        write_config(directory, tie, steps=100)
    return read_history(write_lines(directory, lines), topology_of)


def cells(*runs: RunHistory) -> dict[str, list[Cell]]:
    return {row.label: list(row.cells) for group in row_groups(runs) for row in group.rows}


def texts(history: RunHistory) -> dict[str, str]:
    return {label: of_runs[0].text for label, of_runs in cells(history).items()}


def test_figures_that_are_not_there_are_said_not_to_be(tmp_path: Path) -> None:
    shown = texts(run(tmp_path, {"step": 1, "lr": 1e-3}))
    assert shown.pop("topology") == "not known: no readable config or summary"
    assert shown.pop("steps").startswith("1, ")
    assert set(shown.values()) == {"not logged"}


def test_losses_and_perplexities(tmp_path: Path) -> None:
    losses = [{"step": step, "validation_loss": loss} for step, loss in ((5, 2.25), (10, 2.5))]
    shown = texts(run(tmp_path, {"step": 10, "loss": 3.125, "lm_loss": 3.0}, *losses))
    assert shown["training loss"] == "3.1250"
    assert shown["of it lm loss"] == "3.0000"
    assert shown["perplexity, training"] == f"{math.exp(3):.4g}"
    assert shown["validation loss, last"] == "2.5000"
    assert shown["validation loss, best"] == "2.2500 at step 5"
    assert shown["perplexity, validation"] == f"{math.exp(2.5):.4g}"


def test_what_is_not_finite(tmp_path: Path) -> None:
    shown = texts(run(tmp_path, {"step": 1, "loss": None, "lm_loss": 1e4, "bank_update_ratio/00": None}))
    assert shown["training loss"] == "not finite"
    assert shown["perplexity, training"] == "not finite"
    assert shown["update / weight norm"] == "not logged"


def test_parameters_from_metrics_or_from_the_summary(tmp_path: Path) -> None:
    logged = run(tmp_path / "a", {"step": 1, "parameters_unique": 3e6, "parameters_untied": 4e6})
    assert texts(logged)["parameters stored"] == "3,000,000 of 4,000,000 untied (75.0%)"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "summary.json").write_text('{"parameters": {"unique": 1000, "untied": 2000}}')
    assert texts(run(tmp_path / "b", {"step": 1, "loss": 1}))["parameters stored"] == "1,000 of 2,000 untied (50.0%)"


def test_speed_memory_and_time(tmp_path: Path) -> None:
    lines = [
        {"step": step, "tokens_per_second": speed, "time/forward": 3 * part, "time/optimizer": part}
        for step, speed, part in ((1, 10, 50.0), (2, 900, 0.5), (3, 1100, 0.5), (4, 1000, 0.5))
    ]
    memory = {"memory_gb": 5.0, "memory_fullest_gb": 6.0, "planned_memory_gb": 8.0, "states_gb": 2.0}
    shown = texts(run(tmp_path, *lines, {"step": 4, **memory}))
    assert shown["tokens/s (median)"] == "1,050"
    assert shown["peak memory, GB"] == "6.000 of 8.000 planned (75%)"
    assert shown["weights, optimizer, GB"] == "2.000, no plan logged"
    assert shown["step time"] == "forward 75%, optimizer 25%"


def test_routing(tmp_path: Path) -> None:
    routing = {
        "layer_max_vio/00": 0.5,
        "layer_max_vio/07": 1.25,
        "layer_max_vio/11": None,
        "routing/token_entropy": 0.75,
        "routing/mean_entropy": 0.5,
        "routing/dropped": 0.031,
        "bank_dead_fraction/00": 0.0,
        "bank_dead_fraction/01": 0.125,
        "bank_dead_fraction/02": 0.0625,
    }
    shown = texts(run(tmp_path, {"step": 1, **routing}))
    assert shown["worst max_vio"] == "1.25 in layer 7"
    assert shown["router entropy"] == "0.750 of a token, 0.500 of the mean"
    assert shown["assignments dropped"] == "3.10%"
    assert shown["dead experts"] == "12.5% of bank 1; 2 of 3 banks have some"


def test_no_dead_expert(tmp_path: Path) -> None:
    assert texts(run(tmp_path, {"step": 1, "bank_dead_fraction/00": 0.0}))["dead experts"] == "none in 1 bank"


def test_each_tied_bank_beside_its_chance(tmp_path: Path) -> None:
    agreement = {"agreement_top1/01": 0.5, "agreement_top1_chance/01": 0.0625, "agreement_top1/02": 0.25}
    shown = texts(run(tmp_path, {"step": 1, **agreement}, tie=TIED))
    assert shown["same favourite expert"] == "bank 1 [1 2]: 0.500, chance 0.062\nbank 2 [3 4]: 0.250, chance not logged"
    assert shown["top-k in common"] == "not logged"
    assert texts(run(tmp_path / "untied", {"step": 1, "loss": 1}, tie=UNTIED))["top-k in common"] == "no tied bank"


def test_update_ratios(tmp_path: Path) -> None:
    ratios = {"bank_update_ratio/00": 2e-3, "bank_update_ratio/01": 5e-4, "bank_update_ratio/02": 1e-3}
    shown = texts(run(tmp_path, {"step": 1, **ratios}))
    assert shown["update / weight norm"] == "5.00e-04 (bank 1) to 2.00e-03 (bank 0)"


def test_differences_are_to_the_first_run(tmp_path: Path) -> None:
    figures = ("loss", "tokens_per_second", "memory_gb", "states_gb")
    first, second = (
        run(tmp_path / name, {"step": 10, **dict(zip(figures, values, strict=True))})
        for name, values in (("first", (2.0, 1000, 8.0, 4.0)), ("second", (2.5, 1500, 4.0, 1.0)))
    )
    shown = cells(first, second)
    assert {of_runs[0].difference for of_runs in shown.values()} == {""}
    assert shown["training loss"][1].difference == "+0.5000, 1.250 x"
    assert shown["tokens/s (median)"][1].difference == "1.500 x"
    assert shown["peak memory, GB"][1].difference == "0.500 x"
    assert shown["weights, optimizer, GB"][1].difference == "0.250 x"
    assert shown["validation loss, best"][1].difference == ""


def test_losses_are_compared_at_the_last_step_in_common(tmp_path: Path) -> None:
    first = run(tmp_path / "a", *({"step": step, "loss": 4.0 - step / 10} for step in (10, 20, 30)))
    second = run(tmp_path / "b", *({"step": step, "loss": 3.0} for step in (5, 20, 25)))
    assert cells(first, second)["training loss"][1].difference == "+1.0000, 1.500 x at step 20"
    both = run(tmp_path / "d", *({"step": step, "loss": 5.0 - step / 10} for step in (10, 20)))
    assert cells(first, both)["training loss"][1].difference == "+1.0000, 1.500 x at step 20"
    third = run(tmp_path / "c", {"step": 7, "loss": 3.0})
    assert cells(first, third)["training loss"][1].difference == "no step in common"


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0.00%"), (1e-6, "below 0.01%"), (0.031, "3.10%"), (0.5, "50.0%"), (math.nan, "not finite")],
)
def test_percentages(share: float, text: str) -> None:
    assert percent(share) == text


def test_names_are_as_short_as_tells_them_apart() -> None:
    assert run_names([Path("/r/tied"), Path("/r/untied")]) == ["tied", "untied"]
    assert run_names([Path("/r/a/run"), Path("/r/b/run")]) == ["a/run", "b/run"]
    assert run_names([Path("/run"), Path("/r/run")])[1] == "r/run"
