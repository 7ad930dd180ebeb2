"""What is read out of run directories, also of live and of broken ones."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from megatron_tied.errors import ConfigError
from megatron_tied.report.history import read_history
from megatron_tied.report.history_lines import Point, read_lines
from tests.report.synthetic_runs import TIED, Synthetic, topology_of, write_config, write_lines


def read(directory: Path):
    return read_history(directory, topology_of)


def test_series_and_last_values(tmp_path: Path) -> None:
    run = read(write_lines(tmp_path, [{"step": 10, "loss": 3}, {"step": 20, "loss": 2.5, "lr": 1e-3}]))
    steps, values = run.series["loss"]
    assert (steps.tolist(), values.tolist()) == ([10, 20], [3.0, 2.5])
    assert run.last("loss") == Point(20, 2.5)
    assert run.last("lr") == Point(20, 1e-3)
    assert run.last("unheard of") is None
    assert run.last_step == 20


def test_the_later_line_of_a_step_wins_for_each_metric_alone(tmp_path: Path) -> None:
    lines = [
        {"step": 2, "loss": 2.0, "lr": 0.2},
        {"step": 4, "loss": 4.0, "lr": 0.4},
        # Gone on with from an earlier checkpoint.
        {"step": 2, "loss": 2.5},
        {"step": 3, "loss": 3.5},
    ]
    run = read(write_lines(tmp_path, lines))
    assert [part.tolist() for part in run.series["loss"]] == [[2, 3, 4], [2.5, 3.5, 4.0]]
    assert [part.tolist() for part in run.series["lr"]] == [[2, 4], [0.2, 0.4]]


def test_the_last_of_many_lines_of_a_step_wins(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": float(line)} for line in range(50) for step in (2, 1)]
    assert read(write_lines(tmp_path, lines)).series["loss"].values.tolist() == [49.0, 49.0]


def test_without_a_config_the_summary_says_how_many_steps_there_are(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"steps": 30}')
    run = read(write_lines(tmp_path, [{"step": 30, "loss": 1.0}]))
    assert run.planned_steps == 30
    assert run.state() == "finished"


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    run = read(write_lines(tmp_path, [{"step": 1, "loss": 1.0}], end='{"step": 2, "lo'))
    assert run.last("loss") == Point(1, 1.0)
    assert run.broken_lines == 1


@pytest.mark.parametrize(
    "line", [b"\xff\xfe", b"[1, 2]", b'"step"', b'{"loss": 1}', b'{"step": "1"}', b'{"step": true}']
)
def test_lines_that_are_no_metrics_are_counted_and_left_out(line: bytes, tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(line + b'\n\n{"step": 1, "loss": 1.0}\n')
    lines = read_lines(file)
    assert lines.series.keys() == {"loss"}
    assert lines.broken == 1


def test_null_is_a_value_that_is_not_finite(tmp_path: Path) -> None:
    lines = [{"step": step, "validation_loss": loss} for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5), (4, None))]
    run = read(write_lines(tmp_path, lines))
    assert math.isnan(run.last("validation_loss").value)
    assert run.best("validation_loss") == Point(2, 2.0)


def test_nothing_finite_has_no_best_and_no_median(tmp_path: Path) -> None:
    run = read(write_lines(tmp_path, [{"step": 1, "loss": None}]))
    assert run.best("loss") is None
    assert run.settled("loss") is None


def test_the_median_leaves_the_first_half_out(tmp_path: Path) -> None:
    speeds = (1.0, 1.0, 1.0, 10.0, 30.0, 20.0)
    run = read(write_lines(tmp_path, [{"step": step, "speed": speed} for step, speed in enumerate(speeds)]))
    assert run.settled("speed") == 20.0


def test_the_last_tables(tmp_path: Path) -> None:
    tables = [{"step": step, "expert_load": {"0": [step, 1.0]}} for step in (10, 30, 20)]
    run = read(write_lines(tmp_path, [{"step": 5, "loss": 1.0}, *tables]))
    assert run.tables["expert_load"] == (30, {"0": [30, 1.0]})
    assert "expert_load" not in run.series


def test_numbered_metrics_in_order_of_their_numbers(tmp_path: Path) -> None:
    names = ("layer_max_vio/100", "layer_max_vio/03", "layer_max_vio/20", "layer_max_vio_worst/01", "layer_max_vio")
    run = read(write_lines(tmp_path, [{"step": 1, **dict.fromkeys(names, 0.5)}]))
    assert list(run.numbered("layer_max_vio")) == [3, 20, 100]


def test_steps_beyond_those_of_any_run_and_values_of_integers(tmp_path: Path) -> None:
    run = read(write_lines(tmp_path, [{"step": 2**40, "tokens": 2**52}]))
    assert run.last("tokens") == Point(2**40, 2.0**52)


def test_topology_and_planned_steps_are_the_configs(tmp_path: Path) -> None:
    write_config(tmp_path, TIED, steps=77)
    run = read(write_lines(tmp_path, [{"step": 7, "loss": 1.0}]))
    assert run.topology_line == "8 layers: 0 [1 2] [3 4] [5 6] 7"
    assert [bank.index for bank in run.tied_banks] == [1, 2, 3]
    assert run.planned_steps == 77
    assert run.config.problem is None
    assert run.config.values["tie"]["group_size"] == 2


def test_a_config_of_another_version_leaves_the_metrics(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "train: {run_dir: x, steps: 9}\nmodel: {preset: quickstart}\nnew_part: {a: 1}\n"
    )
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 9, "topology": "2 layers: 0 1"}))
    run = read(write_lines(tmp_path, [{"step": 9, "loss": 1.0}]))
    assert run.last("loss") == Point(9, 1.0)
    assert "new_part" in run.config.problem
    assert (run.topology, run.topology_line) == (None, "2 layers: 0 1")
    assert run.planned_steps == 9


@pytest.mark.parametrize("text", [None, "a: [", "- 1", ""])
def test_configs_that_are_none(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    run = read(write_lines(tmp_path, [{"step": 1, "loss": 1.0}]))
    assert run.config.problem is not None
    assert run.config.values == {}
    assert (run.topology, run.topology_line, run.planned_steps) == (None, None, None)


def test_finished_stopped_and_still_running(tmp_path: Path) -> None:
    write_config(tmp_path, steps=100)
    lines = [{"step": step, "loss": 1.0, "step_seconds": 60.0} for step in (10, 20)]
    write_lines(tmp_path, lines)
    os.utime(tmp_path / "metrics.jsonl", (5000, 5000))
    run = read(tmp_path)
    # Ten steps of a minute lie between two lines, and four such intervals may pass.
    assert run.state(now=5000 + 4 * 600) == "still running"
    assert run.state(now=5000 + 4 * 600 + 1) == "stopped"
    # A run that goes on beyond an earlier end still has the summary of that.
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 20}))
    assert read(tmp_path).state(now=5000) == "still running"
    write_lines(tmp_path, [*lines, {"step": 100, "loss": 1.0}])
    assert read(tmp_path).state(now=9e9) == "finished"


def test_a_broken_summary_is_none(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"steps": ')
    assert read(write_lines(tmp_path, [{"step": 1, "loss": 1.0}])).summary == {}


@pytest.mark.parametrize(("text", "told"), [("", "it has none"), ('{"step": 1', "none of its 1 lines can be read")])
def test_without_a_metric_there_is_no_run(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=told) as error:
        read(tmp_path)
    assert error.value.problems[0].field == "RUN_DIR"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ConfigError, match="Is a directory"):
        read(tmp_path)


def test_progress_adds_up_to_the_size(tmp_path: Path) -> None:
    write_lines(tmp_path, ({"step": step, "loss": 1.0, "padding": "x" * 1000} for step in range(3000)), end="{")
    told: list[int] = []
    read_history(tmp_path, topology_of, told.append)
    assert len(told) > 2
    assert sum(told) == (tmp_path / "metrics.jsonl").stat().st_size


def test_a_realistic_run_comes_whole(tmp_path: Path) -> None:
    run = read(Synthetic(TIED, steps=200).write(tmp_path))
    assert len(run.series["loss"].steps) == 200 / 5
    assert np.all(np.diff(run.series["loss"].steps) == 5)
    assert run.numbered("bank_weight_norm")[3] == Point(200, 33.0)
    assert set(run.tables) == {"expert_load", "bank_load", "agreement"}
    assert run.state() == "finished"


def test_a_number_that_no_float_holds_breaks_its_line(tmp_path: Path) -> None:
    run = read(write_lines(tmp_path, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 10**400}]))
    assert run.series["loss"].values.tolist() == [2.0]
    assert run.broken_lines == 1
