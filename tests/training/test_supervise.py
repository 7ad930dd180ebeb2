"""A rank is killed under `megatron-tied supervise`: the run goes on by itself, and ends as if nothing had happened."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

from tests.training.conftest import Run
from tests.training.runs import ROOT, Corpus, deepspeed_command, environment, series, write_config
from tests.training.test_signals import everything, ranks


def test_a_killed_rank(corpus: Corpus, reference_run: Run, tmp_path: Path) -> None:
    config, run = write_config(tmp_path, corpus), tmp_path / "run"
    supervise = [sys.executable, "-m", "megatron_tied.cli.main", "supervise", "--restarts", "1", "--"]
    command = [*supervise, *deepspeed_command(config, "checkpoint.save_every=2", "checkpoint.async_save=false")]
    job = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "step_00000004").exists():
        assert job.poll() is None, job.communicate()[0][-4000:]
        assert time.monotonic() < deadline, "training does not begin"
        time.sleep(0.01)
    before = everything(job)
    ranks(job)[1].kill()
    shown, _ = job.communicate(timeout=120)
    assert job.returncode == 0, shown
    assert shown.count("error: lost: rank ") == 1
    (line,) = [line for line in shown.splitlines() if line.startswith("supervise: ")]
    # The launcher's, of the rank that it finds dead first.
    assert re.match(r"supervise: exit code (247|75); restart 1 of 1 in 1 s, after step ", line)
    assert "goes on after step " in shown
    for metric in ("loss", "grad_norm", "validation_loss"):
        assert series(run, metric) == series(reference_run.directory, metric)
    assert not [process for process in before if process.is_running()]
