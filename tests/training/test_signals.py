"""SIGTERM and SIGUSR1 end a run after its step, with a checkpoint and exit code 0; the same command goes on."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.training.runs import (
    ROOT,
    Corpus,
    alone_command,
    deepspeed_command,
    environment,
    finish,
    read_metrics,
    series,
    write_config,
)


def start(command: list[str], run: Path, output: Path | None = None) -> subprocess.Popen[str]:
    """A job that has begun to train; what it shows goes to `output`, or into a pipe."""
    to = subprocess.PIPE if output is None else output.open("w")
    job = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=to, stderr=subprocess.STDOUT, text=True)
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.exists() and metrics.stat().st_size):
        assert job.poll() is None, output.read_text() if output else job.communicate()[0][-4000:]
        assert time.monotonic() < deadline, "training does not begin"
        time.sleep(0.1)
    return job


def ranks(job: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of the ranks, without those that load data for them."""
    found = psutil.Process(job.pid).children(recursive=True)
    train = [process for process in found if any(part.startswith("--local_rank=") for part in process.cmdline())]
    return [process for process in train if process.parent() not in train]


def everything(job: subprocess.Popen[str]) -> list[psutil.Process]:
    """The launcher, what it has started, and so on: what a scheduler signals."""
    return [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]


def test_asked_for_a_save_before_the_first_step(corpus: Corpus, tmp_path: Path) -> None:
    config, log = write_config(tmp_path, corpus), tmp_path / "log"
    command = deepspeed_command(config, "train.steps=100000", "checkpoint.save_every=50000")
    with log.open("w") as output:
        job = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 300
    while "processes 2, expert parallel" not in log.read_text():
        assert job.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    ranks(job)[1].send_signal(signal.SIGUSR1)
    assert job.wait(120) == 0, log.read_text()
    last = read_metrics(tmp_path / "run")[-1]["step"]
    assert f"step {last}: received SIGUSR1, saving" in log.read_text()


def test_a_longer_run_has_no_summary_before_its_end(corpus: Corpus, tmp_path: Path) -> None:
    # Schedulers and supervisors take it for the end.
    config, summary = write_config(tmp_path, corpus), tmp_path / "run" / "summary.json"
    alone = [
        "parallel.expert_model_parallel_size=1",
        "train.eval_every=0",
        "checkpoint.save_every=50000",
        "optimizer.warmup_steps=1",
    ]
    first = finish(alone_command(config, *alone, "train.steps=2"))
    assert first.code == 0, first.output
    assert json.loads(summary.read_text())["steps"] == 2
    (tmp_path / "run" / "metrics.jsonl").unlink()
    job = start(alone_command(config, *alone, "train.steps=100000"), tmp_path / "run")
    assert not summary.exists()
    job.terminate()
    shown, _ = job.communicate(timeout=120)
    assert job.returncode == 0, shown
    assert not summary.exists()


@pytest.mark.parametrize(
    ("number", "one_rank"), [(signal.SIGUSR1, True), (signal.SIGTERM, True), (signal.SIGTERM, False)]
)
def test_saved_before_the_end(corpus: Corpus, tmp_path: Path, number: signal.Signals, one_rank: bool) -> None:
    config, run = write_config(tmp_path, corpus), tmp_path / "run"
    overrides = ["train.steps=100000", "checkpoint.save_every=50000", "train.eval_every=0"]
    job = start(deepspeed_command(config, *overrides), run)
    signalled = [ranks(job)[-1]] if one_rank else everything(job)
    for process in signalled:
        process.send_signal(number)
    while one_rank and signalled[0].is_running() and signalled[0].status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.02)
        with contextlib.suppress(psutil.NoSuchProcess):
            signalled[0].send_signal(number)  # late ones do not matter
    shown, _ = job.communicate(timeout=120)
    last = read_metrics(run)[-1]["step"]
    assert f"step {last}: received {number.name}, saving" in shown
    assert f"step {last}: saved {run}/checkpoints/step_{last:08d}" in shown
    assert f"stopped after step {last} of 100000; to go on, start it again (train.resume: auto)" in shown
    assert not (run / "summary.json").exists()
    if one_rank:
        assert job.returncode == 0, shown
        finished = finish(deepspeed_command(config, *overrides, f"train.steps={last + 2}"))
        assert finished.code == 0, finished.output
        assert f"goes on after step {last}: {run}/checkpoints/step_{last:08d}" in finished.our_lines
        assert len(series(run, "loss")) == last + 2
