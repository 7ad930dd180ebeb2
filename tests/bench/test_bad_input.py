"""Bad input is told before any rank is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_tied.bench import launch
from megatron_tied.cli.main import main

OLMOE = ["model.preset=olmoe", "model.scale=tiny"]


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that starts fails the test."""

    def started(*_: object) -> None:
        raise AssertionError("ranks were started")

    monkeypatch.setattr(launch, "run_on_ranks", started)
    monkeypatch.delenv("RANK", raising=False)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--against", "untied,hugginface"],
            "--against = 'hugginface': must be one of untied, huggingface",
        ),
        (["--against", ","], "--against = ',': must name one or more of"),
        (["--json", "/nowhere/at/all.json"], "--json = '/nowhere/at/all.json': must be in a directory that is there"),
        (["--json", "/proc"], "--json = '/proc': must be a file that can be written"),
        (["--config", "/nowhere.yaml"], "--config = '/nowhere.yaml': cannot be read"),
        (["model.hiden_size=64"], "model.hiden_size = 64: is not a model option; did you mean model.hidden_size?"),
        (
            ["--ranks", "3", "parallel.expert_model_parallel_size=2"],
            "parallel.expert_model_parallel_size = 2: must divide the number of processes = 3",
        ),
        (["--ranks", "2", "train.global_batch_size=6"], "train.global_batch_size = 6: must be a multiple of 8"),
        (["tie.group_size=1"], "tie.group_size = 1: must tie some layers"),
        (["distill.teacher=somewhere"], "distill.teacher = 'somewhere': must be null"),
        (["optimizer.freeze=[norms]"], "optimizer.freeze = ['norms']: must be empty"),
        (["--against", "huggingface", "train.precision=fp16"], "train.precision = 'fp16': must be bf16 or fp32"),
        (
            ["--against", "huggingface", "deepspeed={zero_optimization: {offload_optimizer: {device: cpu}}}"],
            "deepspeed.zero_optimization.offload_optimizer = 'cpu': must be left out with --against huggingface",
        ),
        (
            ["--against", "huggingface", "deepspeed={zero_optimization: {stage: 3, offload_param: {device: cpu}}}"],
            "deepspeed.zero_optimization.offload_param = 'cpu': must be left out with --against huggingface",
        ),
        (
            ["--against", "huggingface", "model.moe_expert_capacity_factor=0.5"],
            "model.moe_expert_capacity_factor = 0.5: must be left out with --against huggingface",
        ),
        (["--against", "huggingface", "model.qk_layernorm=false"], "model.qk_layernorm = False: must be true"),
        (
            ["--against", "huggingface", "tie.num_tied_experts=32"],
            "tie.num_tied_experts = 32: cannot be",
        ),
        (
            ["--against", "huggingface", "tie.share=all"],
            "tie.share = 'all': must be experts with --against huggingface",
        ),
        (["--against", "autoep"], "parallel.expert_model_parallel_size = 1: must be more than 1 with --against autoep"),
        (
            ["--ranks", "2", "--against", "autoep", "parallel.expert_model_parallel_size=2", *OLMOE],
            "--against = 'autoep': must be left out: DeepSpeed's AutoEP has no preset for OLMoE",
        ),
        (
            ["--ranks", "2", "--against", "megatron-core", "parallel.tensor_model_parallel_size=2"],
            "parallel.tensor_model_parallel_size = 2: must be 1 with --against megatron-core",
        ),
    ],
)
def test_what_is_wrong_is_named(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_all_configs_are_checked_before_the_first_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = tmp_path / "good.yaml"
    good.write_text("model: {preset: quickstart}\ntie: {group_size: 4}\ndata: {train: a}\ntrain: {run_dir: b}\n")
    bad = tmp_path / "bad.yaml"
    bad.write_text("model: {preset: quickstart}\ntie: {group_size: 0}\ndata: {train: a}\ntrain: {run_dir: b}\n")
    assert main(["bench", "--config", str(good), "--config", str(bad)]) == 2
    assert "tie.group_size = 0" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--steps", "-1"], ["--ranks", "two"], ["--memory"]])
def test_counts_and_options_are_checked(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", *arguments])
    assert end.value.code == 2


def test_a_launcher_decides_how_many_ranks_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "::1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert main(["bench", "--ranks", "4"]) == 2
    assert "--ranks = 4: must be 2 or left out" in capsys.readouterr().err


def test_help_tells_what_is_compared(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", "--help"])
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "tied against untied on this machine, in turns in one run" in shown
    assert "untied,huggingface,megatron-core,autoep" in shown
