"""A grid is trained to its end however often it is interrupted, and every row once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from run_grid import GridRow, main, rows_of

from megatron_tied.training.config_file import save_config
from tests.training.runs import ROOT, Corpus, config_values, environment, read_metrics, series

STEPS = 100
SECONDS = 300


@pytest.fixture
def configs(corpus: Corpus, tmp_path: Path) -> list[Path]:
    """g1 and g4, a checkpoint every ten steps."""
    values = config_values(corpus, tmp_path / "unused")
    values["parallel"] = {}
    values["train"] |= {"steps": STEPS, "global_batch_size": 2, "eval_every": STEPS}
    values["checkpoint"] = {"save_every": 10, "keep_last": 1}
    values["monitor"] = {"every": 0, "expensive_every": 0, "tensorboard": False}
    paths = []
    for group_size in (1, 4):
        path = tmp_path / f"g{group_size}.yaml"
        path.write_text(json.dumps(values | {"tie": {"group_size": group_size, "skip_first": 1, "skip_last": 0}}))
        paths.append(path)
    return paths


class Runner:
    """The command, started as people do."""

    def __init__(self, configs: list[Path], runs: Path):
        launcher = Path(sys.executable).with_name("deepspeed")
        launch = f"{launcher} --num_accelerators 1 --master_port {{port}} --module megatron_tied.pretrain"
        options = ["--runs", str(runs), "--seeds", "1", "2", "--jobs", "2", "--launch", launch]
        self._command = [sys.executable, "examples/paper/run_grid.py", *map(str, configs), *options]

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self._command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.05)


def kill_all(process: subprocess.Popen[str]) -> None:
    """What a power failure does."""
    processes = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in processes:
        one.kill()
    psutil.wait_procs(processes)
    process.wait()


def test_four_rows_interrupted_twice_are_trained_once_and_make_a_table(configs: list[Path], tmp_path: Path) -> None:
    runs, runner = tmp_path / "runs", Runner(configs, tmp_path / "runs")

    def has_saved(name: str) -> bool:
        return any((runs / name / "checkpoints").glob("step_*")) and (runs / name / "metrics.jsonl").exists()

    first = runner.start()
    wait_for(lambda: has_saved("g1-seed1") or has_saved("g4-seed1"), first)
    first.send_signal(signal.SIGINT)
    shown = first.communicate(timeout=SECONDS)[0]
    assert first.returncode == 130, shown
    assert "interrupted: type the same again to go on" in shown
    assert any(0 < len(series(path.parent, "loss")) < STEPS for path in runs.glob("*/metrics.jsonl"))
    assert not (runs / "g1-seed2").exists()

    second = runner.start()
    wait_for(lambda: has_saved("g1-seed2") or has_saved("g4-seed2"), second)
    kill_all(second)
    finished = [path.parent.name for path in runs.glob("*/summary.json")]
    assert finished
    written = {name: (runs / name / "summary.json").stat().st_mtime_ns for name in finished}

    third = runner.start()
    shown = third.communicate(timeout=SECONDS)[0]
    assert third.returncode == 0, shown
    assert {name: (runs / name / "summary.json").stat().st_mtime_ns for name in finished} == written
    for name in ("g1-seed1", "g4-seed1", "g1-seed2", "g4-seed2"):
        assert [line["step"] for line in read_metrics(runs / name) if "loss" in line] == list(range(1, STEPS + 1))
        assert (f"{name}: finished, loss" in shown) == (name not in finished)

    table = [sys.executable, "examples/paper/make_tables.py", str(runs), "--output", str(tmp_path / "tables")]
    subprocess.run(table, cwd=ROOT, env=environment(), check=True)
    rows = (tmp_path / "tables" / "tables.md").read_text().splitlines()
    assert [row.split("|")[4].strip() for row in rows if row.startswith(("| g1 ", "| g4 "))] == ["2", "2"]


def test_a_row_that_fails_is_told_and_the_others_are_trained(
    configs: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # Stands in for a training: the one fails, the other has done its last step.
    fake = tmp_path / "fake.py"
    fake.write_text(
        "import pathlib, sys\n"
        "(run,) = (pathlib.Path(word.partition('=')[2]) for word in sys.argv if word.startswith('train.run_dir='))\n"
        "sys.exit('no memory') if 'g1' in run.name else None\n"
        "(run / 'metrics.jsonl').write_text('{\"step\": 150, \"loss\": 1.5}\\n')\n"
        "(run / 'summary.json').write_text('{}')\n"
    )
    runs = tmp_path / "runs"
    launch = f"{sys.executable} {fake} megatron_tied.pretrain"
    assert main([*map(str, configs), "--runs", str(runs), "--launch", launch]) == 1
    told = "".join(capfd.readouterr().err.split())  # a long path is cut anywhere
    assert f"g1-seed1:failed:exitcode1,see{runs / 'g1-seed1.log'}" in told
    assert "g4-seed1:finished,loss1.5000" in told
    assert told.endswith("failed:g1-seed1")
    assert (runs / "g1-seed1.log").read_text().startswith("no memory\n")


def test_bad_input_is_told_before_anything_is_trained(
    configs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    assert main([str(configs[0]), "optimizer.lr=x", "--runs", str(runs)]) == 2
    assert "optimizer.lr = 'x': must be a number" in capsys.readouterr().err
    assert main([str(configs[0]), str(configs[0]), "--runs", str(runs)]) == 2
    assert "CONFIG = 'g1-seed1': must be there once" in capsys.readouterr().err
    assert main(["optimizer.lr=1", "--runs", str(runs)]) == 2
    assert "CONFIG = None: must be given" in capsys.readouterr().err
    assert main([str(configs[0]), "--jobs", "0", "--runs", str(runs)]) == 2
    assert "--jobs = 0: must be at least 1" in capsys.readouterr().err
    assert not runs.exists()


def test_a_finished_row_is_not_taken_for_one_that_is_trained_otherwise(
    configs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    (row,) = rows_of(configs[:1], runs, [1], [])
    row.run_dir.mkdir(parents=True)
    (row.run_dir / "summary.json").write_text("{}")
    # What a run finds out by itself is not a difference.
    found = row.config.model_copy(update={"model": row.config.model.model_copy(update={"vocab_size": 320})})
    save_config(found, row.run_dir / "config.yaml")
    assert main([str(configs[0]), "--runs", str(runs)]) == 0
    assert main([str(configs[0]), "optimizer.lr=0.5", "--runs", str(runs)]) == 2
    assert f"optimizer.lr = 0.5: must be 0.005, with which {row.run_dir} was trained" in capsys.readouterr().err


def test_seeds_come_first_and_overrides_last(configs: list[Path], tmp_path: Path) -> None:
    rows = rows_of(configs, tmp_path, [1, 2], ["train.steps=7"])
    assert [row.name for row in rows] == ["g1-seed1", "g4-seed1", "g1-seed2", "g4-seed2"]
    assert {(row.config.train.steps, row.config.train.seed) for row in rows} == {(7, 1), (7, 2)}
    assert rows[0].overrides == ["train.steps=7", "train.seed=1", f"train.run_dir={tmp_path / 'g1-seed1'}"]


def test_the_last_loss_is_found_behind_other_lines_and_half_a_line(configs: list[Path], tmp_path: Path) -> None:
    row = GridRow.of(configs[0], [], tmp_path, 1)
    row.run_dir.mkdir()
    assert row.figures() == (0, None)
    (row.run_dir / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 3}\n{"step": 2, "validation_loss": 1}\n{"step": 3, "lo'
    )
    assert row.figures() == (1, 3)
