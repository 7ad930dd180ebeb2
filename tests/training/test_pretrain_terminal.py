"""Training in front of a person: the bar on a terminal, and Ctrl-C."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import psutil
import pytest

from megatron_tied import pretrain
from megatron_tied.errors import TrainingStopped
from megatron_tied.training import run
from tests.training.conftest import Run
from tests.training.runs import (
    ROOT,
    Corpus,
    alone_command,
    deepspeed_command,
    environment,
    read_metrics,
    series,
    write_config,
)

CTRL_C = b"\x03"
# Its standard input is the keyboard of a terminal of 100 columns, in which the command runs.
_TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])) % 256)"
_SIZED = ("sh", "-c", 'stty cols 100 rows 30; exec "$@"', "sh")


def in_terminal(command: list[str], keys: Callable[[], bytes] = bytes) -> tuple[int, str]:
    """The exit code and all that a terminal showed; `keys` are pressed when the command runs."""
    terminal = subprocess.Popen(
        [sys.executable, "-c", _TERMINAL, *_SIZED, *command],
        cwd=ROOT,
        env=environment(TERM="xterm"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        shown, _ = terminal.communicate(keys() or None, timeout=600)
    finally:
        terminal.kill()
    return terminal.returncode, shown.decode()


def test_bar_shows_rate_time_left_and_loss(corpus: Corpus, reference_run: Run, tmp_path: Path):
    """Also: one process without a launcher trains like two under the launcher."""
    config = write_config(tmp_path, corpus)
    code, shown = in_terminal(alone_command(config, "parallel.expert_model_parallel_size=1"))
    assert code == 0, shown
    last_bar = shown[shown.rindex("training:") :].splitlines()[0]
    loss = series(tmp_path / "run", "loss")[-1]
    assert re.fullmatch(
        rf"training: 100%\|.*\| 12/12 \[\d\d:\d\d<00:00, +[\d.]+(s/step|step/s), loss {loss:.4f}\]\S*", last_bar
    ), last_bar
    # What is said beside the bar stands in lines of its own, which the bar does not repeat.
    said = [line.rpartition("\r")[2] for line in shown.replace("\x1b[A", "").splitlines()]
    assert [line for line in said if line.startswith("step ")] == [
        f"step {step}: validation loss {loss:.4f}"
        for step, loss in zip((5, 10, 12), series(tmp_path / "run", "validation_loss"), strict=True)
    ]
    for metric in ("loss", "validation_loss"):
        expected = series(reference_run.directory, metric)
        assert series(tmp_path / "run", metric) == pytest.approx(expected, rel=1e-5)


def test_ctrl_c_ends_all_processes_and_leaves_nothing_that_looks_finished(corpus: Corpus, tmp_path: Path):
    config = write_config(tmp_path, corpus)
    metrics = tmp_path / "run" / "metrics.jsonl"
    # Of earlier tests in this session: multiprocessing's helpers may stay as zombies.
    before = psutil.Process().children(recursive=True)
    processes: list[psutil.Process] = []

    def press_ctrl_c() -> bytes:
        deadline = time.monotonic() + 300
        while not (metrics.exists() and metrics.stat().st_size):
            assert time.monotonic() < deadline, "training does not begin"
            time.sleep(0.2)
        processes.extend(child for child in psutil.Process().children(recursive=True) if child not in before)
        return CTRL_C

    code, shown = in_terminal(deepspeed_command(config, "train.steps=100000"), press_ctrl_c)
    assert code != 0
    # The terminal, its shell's successor, the launcher's two processes, two ranks: at least these.
    assert len(processes) >= 5
    _, alive = psutil.wait_procs(processes, timeout=20)
    for process in alive:
        process.kill()
    assert alive == []
    assert not (tmp_path / "run" / "summary.json").exists()
    assert read_metrics(tmp_path / "run")[0]["step"] == 1
    # DeepSpeed's launcher shows where it was interrupted; our ranks show nothing of the kind.
    assert shown.count("Traceback") <= 1
    assert "megatron_tied/" not in shown


def _raising(error: BaseException) -> Callable[[object], NoReturn]:
    def run(_config: object) -> NoReturn:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted: {run_dir} has no checkpoint"),
        (TrainingStopped("step 3: what to do"), 1, "error: step 3: what to do"),
    ],
)
def test_how_training_that_does_not_finish_ends(
    error: BaseException,
    code: int,
    line: str,
    corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    config = write_config(tmp_path, corpus)
    monkeypatch.setattr(run, "run", _raising(error))
    monkeypatch.setattr("megatron_tied.pretrain.PATIENCE_SECONDS", 0)
    arguments = ["--config", str(config), "parallel.expert_model_parallel_size=1"]
    assert pretrain.main(arguments) == code
    assert capsys.readouterr().err == line.format(run_dir=tmp_path / "run") + "\n"
    second = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in second.items():
        monkeypatch.setenv(name, value)
    assert pretrain.main(arguments) == code
    assert capsys.readouterr().err == ""
