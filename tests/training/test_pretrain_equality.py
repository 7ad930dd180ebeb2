"""The same run, whatever the launcher, the number of processes, their groups, and the ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest

from megatron_tied.planner.parameters import count_parameters
from megatron_tied.training.config_file import load_config
from tests.distributed.launch import launch
from tests.training.conftest import Run
from tests.training.runs import Corpus, read_metrics, series, write_config

EP, STAGE = "parallel.expert_model_parallel_size", "deepspeed.zero_optimization.stage"
SAME = {
    "ep1": [f"{EP}=1"],
    "tp2": ["parallel.tensor_model_parallel_size=2", "train.check_consistency_every=1"],
    "zero0": [f"{STAGE}=0"],
    "zero2": [f"{STAGE}=2"],
    "zero3": [f"{STAGE}=3"],
    "rarely_logged": ["train.log_every=4", "train.eval_every=0"],
}


@pytest.fixture(scope="module")
def runs(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that holds all run directories by name, made under torchrun by two processes."""
    directory = tmp_path_factory.mktemp("equality")
    short = ["train.steps=4", "optimizer.warmup_steps=1"]
    other = {
        "blend": [f"data.train=[0.75,{corpus.a},0.25,{corpus.b}]", *short],
        "held_out": [f"data.validation={corpus.b}", "monitor.tensorboard=false", *short],
        "wide_bf16": ["tie.num_tied_experts=6", "train.precision=bf16", *short],
    }
    commands = {str(directory / name): overrides for name, overrides in (SAME | other).items()}
    output = launch("tests.training.many_runs", 2, str(write_config(directory, corpus)), json.dumps(commands))
    assert "Warning" not in output
    return directory


@pytest.mark.parametrize("name", sorted(SAME.keys() - {"rarely_logged"}))
def test_losses_do_not_depend_on_groups_and_stage(runs: Path, reference_run: Run, name: str):
    for metric in ("loss", "lm_loss", "aux_loss", "z_loss", "validation_loss"):
        expected = series(reference_run.directory, metric)
        assert series(runs / name, metric) == pytest.approx(expected, rel=1e-5), metric
    norms = series(reference_run.directory, "grad_norm")
    assert series(runs / name, "grad_norm") == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize("name", sorted(SAME))
def test_every_run_counts_the_same_parameters(runs: Path, reference_run: Run, name: str):
    expected = json.loads((reference_run.directory / "summary.json").read_text())["parameters"]
    assert json.loads((runs / name / "summary.json").read_text())["parameters"] == expected


def test_a_logged_line_is_the_mean_of_its_steps(runs: Path, reference_run: Run):
    lines = read_metrics(runs / "rarely_logged")
    assert not any("validation_loss" in line for line in lines)
    lines = [line for line in lines if "loss" in line]
    assert [line["step"] for line in lines] == [4, 8, 12]
    for metric in ("loss", "lm_loss", "aux_loss", "z_loss"):
        each = series(reference_run.directory, metric)
        means = [mean(each[first : first + 4]) for first in (0, 4, 8)]
        assert [line[metric] for line in lines] == pytest.approx(means, rel=1e-5)
    for metric in ("grad_norm", "lr"):
        last = series(reference_run.directory, metric)[3::4]
        assert [line[metric] for line in lines] == pytest.approx(last, rel=1e-4)


def test_a_blend_is_other_data(runs: Path, reference_run: Run):
    blended = series(runs / "blend", "lm_loss")
    assert blended[-1] < blended[0] - 0.3
    assert blended[0] != pytest.approx(series(reference_run.directory, "lm_loss")[0], rel=1e-5)


def test_validation_data_of_its_own(runs: Path, corpus: Corpus):
    directory = runs / "held_out"
    assert load_config(directory / "config.yaml").data.validation == str(corpus.b)
    (loss,) = series(directory, "validation_loss")
    assert loss == pytest.approx(series(directory, "lm_loss")[-1], abs=0.5)
    assert loss not in series(runs / "blend", "validation_loss")
    assert not (directory / "tensorboard").exists()


def test_wider_tied_banks_in_half_precision(runs: Path):
    directory = runs / "wide_bf16"
    summary = json.loads((directory / "summary.json").read_text())
    config = load_config(directory / "config.yaml")
    count = count_parameters(config.model, config.topology())
    figures = summary["parameters"]
    assert (figures["unique"], figures["untied"]) == (count.total, count.untied)
    assert (figures["unique_bytes"], figures["untied_bytes"]) == (2 * count.total, 2 * count.untied)
    losses = series(directory, "lm_loss")
    assert losses[-1] < losses[0] - 0.3
