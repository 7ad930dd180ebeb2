"""`megatron-tied doctor` and `--preflight` as people use them, on one host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tied.cli import main as cli
from megatron_tied.doctor.__main__ import main as doctor_rank
from megatron_tied.doctor.findings import Level
from megatron_tied.doctor.request import Request, read_line
from tests.training.runs import Corpus, alone_command, deepspeed_command, finish, write_config


@pytest.fixture
def config(corpus: Corpus, tmp_path: Path) -> Path:
    return write_config(tmp_path, corpus)


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys\n"
        "from megatron_tied.cli.main import main\n"
        "try: main(['doctor', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print('heavy:', sorted(sys.modules.keys() & {'torch', 'deepspeed', 'numpy'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "--hostfile" in done.stdout
    assert "heavy: []" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--hostfile", "/nowhere/hostfile"], "--hostfile = '/nowhere/hostfile': cannot be read"),
        (["--config", "/nowhere/config.yaml"], "--config = '/nowhere/config.yaml': cannot be read"),
        (["--master_port", "29501"], "--master_port = 29501: needs --hostfile"),
        (["train.steps=3"], "section.field=value = ['train.steps=3']: needs --config"),
    ],
)
def test_bad_input(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_a_config_that_the_hosts_have_no_room_for(config: Path, tmp_path: Path, capsys) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node0 slots=3\n")
    assert cli.main(["doctor", "--hostfile", str(hostfile), "--config", str(config)]) == 2
    assert "parallel.expert_model_parallel_size = 2: must divide the number of processes = 3" in capsys.readouterr().err


def test_what_a_launcher_left_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert cli.main(["doctor"]) == 2
    assert "WORLD_SIZE = 'two': must be a whole number of 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize(("local_rank", "tells"), [("0", True), ("none", True), ("1", False)])
def test_a_launcher_that_tells_no_rank_is_told_by_every_host(
    local_rank: str, tells: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "2", "LOCAL_RANK": local_rank, "WORLD_SIZE": "two", "MASTER_ADDR": "node0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert doctor_rank(Request(None, [], 5.0).encode()) == 1
    findings = [finding for line in capsys.readouterr().out.splitlines() if (finding := read_line(line)) is not None]
    told = [finding.what for finding in findings]
    assert ("WORLD_SIZE = 'two': must be a whole number of 1 or more" in told) is tells
    assert ("LOCAL_RANK = 'none': must be a whole number of 0 or more" in told) is (local_rank == "none")
    assert all(
        (finding.check, finding.level, finding.hosts) == ("launch", Level.ERROR, (os.uname().nodename,))
        for finding in findings
    )


def test_this_host_alone(config: Path) -> None:
    command = [sys.executable, "-m", "megatron_tied.cli.main", "doctor", "--config", str(config)]
    done = finish([*command, "checkpoint.save_every=5", "--json"])
    assert done.code == 0, done.output
    told = json.loads(done.output)
    assert told["passed"]
    assert {"ports", "versions", "disk", "data"} <= {finding["check"] for finding in told["findings"]}


def test_training_follows_a_preflight(config: Path) -> None:
    done = finish(
        deepspeed_command(config, "--preflight", "train.steps=1", "train.eval_every=0", "optimizer.warmup_steps=0")
    )
    assert done.code == 0, done.output
    assert done.output.count("✓  versions") == 1
    assert "step 1/1" in done.output
    assert (config.parent / "run/summary.json").exists()


def test_no_training_follows_what_a_preflight_finds(config: Path) -> None:
    overrides = ["parallel.expert_model_parallel_size=1", f"data.train={config.parent / 'missing'}"]
    done = finish(alone_command(config, "--preflight", *overrides))
    assert done.code == 2, done.output
    assert done.output.count("missing.bin: missing on ") == 1
    assert not (config.parent / "run").exists()
