"""A SLURM job saves before its time limit, is queued again, and goes on; srun and scontrol are stand-ins."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, needs_cluster
from tests.cluster.launches import SCRIPTS, write_config
from tests.training.runs import ROOT, Corpus, Finished, read_metrics, series

_STAND_INS = Path(__file__).with_name("slurm")
_JOB = 4217


def directives() -> argparse.Namespace:
    """What the script asks SLURM for; fails on an option that sbatch does not have."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for option in ("job-name", "time", "signal", "output", "open-mode", "gpus-per-node"):
        parser.add_argument(f"--{option}")
    for option in ("nodes", "ntasks-per-node", "cpus-per-task"):
        parser.add_argument(f"--{option}", type=int)
    parser.add_argument("--requeue", action="store_true")
    lines = (SCRIPTS / "slurm.sbatch").read_text().splitlines()
    return parser.parse_args([line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")])


def test_asks_for_a_signal_and_a_place_in_the_queue() -> None:
    asked = directives()
    assert re.fullmatch(r"USR1@\d+", asked.signal), "ranks are signalled, not the script: no B:"
    assert asked.requeue
    assert asked.open_mode == "append", "what a job said before it was queued again is to be kept"
    assert asked.ntasks_per_node == int(asked.gpus_per_node), "a task is a rank"


class Slurm:
    """Runs the script as SLURM would: a copy of it, on the first node, from where sbatch was called."""

    def __init__(self, cluster: Cluster, arguments: list[str | Path]):
        self.cluster, self._arguments = cluster, arguments
        self._script = cluster.shared / "spool" / "slurm_script"
        self._script.parent.mkdir(exist_ok=True)
        shutil.copy(SCRIPTS / "slurm.sbatch", self._script)
        self.queue = cluster.shared / "queue"
        self.log = cluster.shared / "slurm.log"

    def start(self) -> subprocess.Popen[str]:
        self.queue.unlink(missing_ok=True)
        size = len(self.cluster.nodes)
        job = {"SLURM_JOB_ID": str(_JOB), "SLURM_JOB_NODELIST": f"node[0-{size - 1}]"}
        job |= {"SLURM_NTASKS": str(size), "SLURM_NTASKS_PER_NODE": "1", "STAND_IN_QUEUE": str(self.queue)}
        first = self.cluster.nodes[0]
        path = f"{_STAND_INS}{os.pathsep}{os.path.dirname(shutil.which('deepspeed'))}{os.pathsep}{os.environ['PATH']}"
        return first.start(
            ["bash", self._script, *self._arguments], job | {"PATH": path, "GLOO_SOCKET_IFNAME": "eth0"}, self.log, ROOT
        )

    def run(self) -> Finished:
        job = self.start()
        return Finished(job.wait(300), self.log.read_text())

    def signal_tasks(self) -> None:
        """What --signal asks for: every process of every task, but not the script."""
        number = getattr(signal, "SIG" + directives().signal.split("@")[0])
        for node in self.cluster.nodes:
            for pid, _ in node.processes():
                if b"\0SLURM_PROCID=" in Path(f"/proc/{pid}/environ").read_bytes():
                    os.kill(pid, number)


@pytest.mark.slow
@needs_cluster
def test_saves_before_the_time_limit_and_goes_on(cluster: Cluster, shared: Corpus) -> None:
    run, steps = cluster.shared / "slurm", 300
    config = write_config(cluster, shared, "slurm")
    slurm = Slurm(cluster, [config, f"train.steps={steps}", "checkpoint.save_every=100000"])
    job, deadline = slurm.start(), time.monotonic() + 300
    while not ((run / "metrics.jsonl").exists() and len(read_metrics(run)) >= 3):
        assert job.poll() is None, slurm.log.read_text()
        assert time.monotonic() < deadline, slurm.log.read_text()
        time.sleep(0.05)
    slurm.signal_tasks()
    assert job.wait(300) == 0, slurm.log.read_text()
    stopped = read_metrics(run)[-1]["step"]
    assert stopped < steps
    assert f"stopped after step {stopped} of {steps}" in slurm.log.read_text()
    assert slurm.queue.read_text() == str(_JOB)

    again = slurm.run()
    assert again.code == 0, again.output
    assert f"goes on after step {stopped}: " in again.output
    assert len(series(run, "loss")) == steps
    assert (run / "summary.json").exists()
    assert not slurm.queue.exists(), "a run that is done is not queued again"


@pytest.mark.slow
@needs_cluster
def test_bad_config_is_not_queued_again(cluster: Cluster, shared: Corpus) -> None:
    config = write_config(cluster, shared, "wrong")
    slurm = Slurm(cluster, [config, "train.stepps=3"])
    done = slurm.run()
    assert done.code == 2, done.output
    assert "train.stepps" in done.output
    assert not slurm.queue.exists()
