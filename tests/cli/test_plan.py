"""`megatron-tied plan` as people type it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tied.cli.main import main

ZERO = "deepspeed.zero_optimization"
ALLGATHER = ["model.moe_token_dispatcher_type=allgather", "parallel.expert_model_parallel_size=8"]
QUICKSTART = str(Path(__file__).parents[2] / "examples" / "quickstart.yaml")


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def test_a_config_is_compared_with_untied(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, "--config", QUICKSTART, "--world-size", "2", "--hardware", "cpu")
    for part in ("untied", "tied, g=4", "12,096,768", "16,815,360", "fits in 16.00", "dominating:", "assumptions:"):
        assert part in text


def test_an_architecture_needs_no_config(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, "--arch", "olmoe", "--scale", "tiny", "--world-size", "24", "--gpu-memory", "3.5")
    assert "522,671,616" in text
    assert "fits in 3.50" in text
    assert "over" in text


def test_overrides_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--arch",
        "olmoe",
        "--world-size",
        "8",
        "--json",
        "tie.group_size=2",
        "deepspeed.zero_optimization.stage=3",
    ]
    plans = json.loads(told(capsys, *arguments))["plans"]
    assert list(plans) == ["untied", "tied, g=2"]
    assert plans["tied, g=2"]["layout"]["zero_stage"] == 3
    assert plans["tied, g=2"]["parameters"]["total"] == 4_707_932_160


def test_a_narrow_untied_model_is_compared(capsys: pytest.CaptureFixture[str]) -> None:
    plans = json.loads(told(capsys, "--arch", "olmoe", "--world-size", "8", "--json", "tie.num_tied_experts=16"))[
        "plans"
    ]
    narrow = plans["untied, 16 experts in the middle"]["parameters"]["total"]
    assert plans["untied"]["parameters"]["total"] - narrow == 12 * (64 - 16) * (3 * 2048 * 1024 + 2048)


def test_a_search(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--arch", "olmoe", "--world-size", "8", "--search", "--group-sizes", "1,4", "--top", "3"]
    text = told(capsys, *arguments)
    assert "layouts fit, with deepspeed.zero_optimization.overlap_comm=true; the fastest" in text
    found = json.loads(told(capsys, *arguments, "--json"))
    assert len(found["plans"]) == 3
    assert found["fitting"] <= found["considered"]


def test_where_nothing_fits_the_smallest_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--arch", "olmoe", "--world-size", "8", "--search", "--gpu-memory", "3"]
    assert "layouts fits; the smallest needs" in told(capsys, *arguments)
    assert "no layout is valid" in told(capsys, *arguments, "--group-sizes", "99")


@pytest.mark.parametrize("key", ["stage3_max_live_parameters", "reduce_bucket_size"])
def test_what_deepspeed_is_told_counts(capsys: pytest.CaptureFixture[str], key: str) -> None:
    arguments = ["--arch", "qwen3_30b_a3b", "--world-size", "32", f"{ZERO}.stage=3", "--json"]
    assert told(capsys, *arguments) != told(capsys, *arguments, f"{ZERO}.{key}=100000")


def test_what_can_only_be_planned_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, "--arch", "deepseek_v3", "--world-size", "1024", "parallel.pipeline_model_parallel_size=4")
    only = [line for line in text.splitlines() if line.startswith("planned only")]
    assert [line.split(": ")[1].split(" ")[0] for line in only] == ["parallel.pipeline_model_parallel_size"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world-size", "8"], "--config = None: must be given, or else --arch"),
        (["--arch", "olmo", "--world-size", "8"], 'did you mean "olmoe"?'),
        (["--scale", "tiny", "--config", QUICKSTART, "--world-size", "2"], "--scale = 'tiny': must come with --arch"),
        (["--config", QUICKSTART, "--world-size", "3"], "parallel.expert_model_parallel_size = 2"),
        (["--arch", "olmoe", "--world-size", "8", "--hardware", "h10"], "did you mean h100?"),
        (["--arch", "olmoe", "--world-size", "8", f"{ZERO}.reduce_bucket_size=abc"], "must be a number >= 0"),
        (["--arch", "olmoe", "--world-size", "8", f"{ZERO}.overlap_comm=maybe"], "must be true or false"),
        (["--arch", "olmoe", "--world-size", "8", "deepspeed.communication_data_type=fp32"], "left out of a plan"),
        (["--arch", "olmoe", "--world-size", "8", "model.recompute_granularity=full"], "model.recompute_method = None"),
        (["--arch", "olmoe", "--world-size", "8", *ALLGATHER], "model.moe_token_dispatcher_type = 'allgather'"),
        (["--arch", "olmoe", "--world-size", "8", "tie.group_sizes=4"], "did you mean 'tie.group_size'?"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_plan_loads_no_torch() -> None:
    code = (
        "import sys\nfrom megatron_tied.cli.main import main\n"
        "main(['plan', '--arch', 'olmoe', '--world-size', '8', '--search', '--top', '1'])\n"
        "print('heavy:', sorted(sys.modules.keys() & {'torch', 'deepspeed', 'megatron.core', 'transformers'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "heavy: []" in done.stdout


@pytest.mark.parametrize("tie", [["tie.banks=[0,1,2,3,4,5]"], []])
def test_a_map_that_ties_nothing_is_the_untied_plan(tie: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--arch", "olmoe", "--scale", "tiny", "--world-size", "2", "model.num_layers=6"]
    assert "\nuntied: 6 layers: 0 1 2 3 4 5\n" in told(capsys, *arguments, *tie)


def test_numbers_beyond_any_machine(capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["--world-size", "1000001"], ["--gpu-memory", "1e308"], ["--imbalance", "1e308"]):
        with pytest.raises(SystemExit, match="2"):
            main(["plan", "--arch", "olmoe", "--world-size", "8", *option])
        assert f"argument {option[0]}: '{option[1]}' must be" in capsys.readouterr().err
