"""Monitoring over whole runs: curves go on after restarts, and alerts come where there is reason for them alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.distributed.launch import launch
from tests.training.monitored_runs import FAILS_AFTER
from tests.training.runs import Corpus, config_values, read_metrics, series


@pytest.fixture(scope="module")
def runs(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("monitored")
    values = config_values(corpus, directory / "unused")
    values["parallel"] = {}
    (directory / "config.yaml").write_text(json.dumps(values))
    launch("tests.training.monitored_runs", 1, str(directory / "config.yaml"), str(directory))
    return directory


def events_of(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


def alerts(runs: Path, name: str) -> list[str]:
    return [line for line in (runs / f"{name}.log").read_text().splitlines() if "ALERT" in line]


def test_three_restarts_continue_every_curve_once(runs: Path):
    log = (runs / "interrupted.log").read_text()
    for step in FAILS_AFTER:
        assert f"goes on after step {step // 3 * 3}:" in log
    events = events_of(runs / "interrupted" / "tensorboard")
    scalars, images = events.Tags()["scalars"], events.Tags()["images"]
    assert {"train/loss", "bank_update_ratio/01", "layer_max_vio/04", "validation/validation_loss"} <= set(scalars)
    for tag in scalars:
        steps = [event.step for event in events.Scalars(tag)]
        assert steps == sorted(set(steps)), tag
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 13))
    assert [event.step for event in events.Scalars("bank_update_ratio/01")] == [2, 4, 6, 8, 10, 12]
    for tag in images:
        assert [event.step for event in events.Images(tag)] == [2, 4, 6, 8, 10, 12], tag


def test_the_file_of_metrics_has_every_step_once(runs: Path):
    lines = read_metrics(runs / "interrupted")
    for key in ("loss", "routing/max_vio"):
        assert [line["step"] for line in lines if key in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "expert_load" in line] == [2, 4, 6, 8, 10, 12]


def test_collapsed_routers_are_told_once_each(runs: Path):
    lines = alerts(runs, "collapsed")
    told = [re.sub(r"ALERT step \d+: ", "", line) for line in lines]
    assert sum("2 of 4 experts" in line and "no token" in line for line in told) == 2, "both banks"
    assert sum("in any layer" in line for line in told) == 1, "the tied one"
    assert sum("busiest expert" in line for line in told) == 5, "every layer"
    assert sum("loop" in line for line in told) == 1, "the tie group"
    assert len(told) == 2 + 5 + 1
    dead = [line for line in lines if "no token" in line]
    assert all(line.startswith("ALERT step 20:") for line in dead)
    assert series(runs / "collapsed", "agreement_overlap/01")[-1] == 1


def test_a_step_that_is_discarded_is_no_update_of_size_zero(runs: Path):
    skipped = {int(step) for step in re.findall(r"step (\d+): skipped", (runs / "discarded.log").read_text())}
    lines = {line["step"]: line for line in read_metrics(runs / "discarded") if "bank_weight_norm/01" in line}
    assert skipped
    assert list(lines) == [1, 2, 3, 4]
    for step, line in lines.items():
        assert ("bank_update_norm/01" in line) == ("bank_update_ratio/00" in line) == (step not in skipped)
    assert alerts(runs, "discarded") == []


def test_a_healthy_run_raises_no_alert(runs: Path):
    assert alerts(runs, "healthy") == []
    losses = series(runs / "healthy", "lm_loss")
    assert len(losses) == 250
    assert losses[-1] < losses[0] - 1
    assert max(series(runs / "healthy", "bank_dead_fraction/01")) == 0


def test_deepspeeds_own_curves_lie_in_the_same_place(runs: Path):
    place = runs / "collapsed" / "tensorboard"
    assert "train/loss" in events_of(place).Tags()["scalars"]
    theirs = events_of(place / "deepspeed").Tags()["scalars"]
    assert "Train/Samples/lr" in theirs
    assert not (runs / "interrupted" / "tensorboard" / "deepspeed").exists()
