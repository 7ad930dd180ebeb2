"""What goes wrong on many machines, at random moments: every run ends or goes on by itself, and is told about once.

`FAULT_RUNS` says how often each case is tried (default 5), `FAULT_SEED` at which moments, `FAULT_TABLE` where the table
of what was measured goes; it is printed in any case.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.cluster.cluster import Cluster, needs_cluster
from tests.training.runs import Corpus, config_values, free_port, series

pytestmark = [needs_cluster, pytest.mark.slow]

RUNS = int(os.environ.get("FAULT_RUNS", "5"))
SEED = int(os.environ.get("FAULT_SEED", "8"))
TIMEOUT = 12.0  # train.liveness_timeout: more than twice the cut that is to be survived
STEPS, EVERY = 80, 5
MOMENTS_SECONDS = 6.0  # after the first step
TOLD = re.compile(r"error: (?:lost|failed): rank (\d) on (node\d) \(last step done: (\d+)\)")
RESTART = re.compile(
    r"supervise: .*; restart \d of 2 in \d+ s on (.*) \((\d) ranks\), after step (\d+), (\d+) steps lost"
)
BEGINS = re.compile("goes on after step|it begins again")  # the second: no checkpoint was there yet
NEAR_STEPS = 10  # after a restart with fewer ranks: the sums are others, and the difference grows from step to step


@dataclass
class Trial:
    """One run with one fault."""

    told_after: float | None = None  # seconds
    back_after: float | None = None  # seconds to the first step after the restart
    steps_lost: int = 0
    restarts: int = 0
    left: int = 0
    difference: float = 0.0  # of losses, from those of an undisturbed run; with fewer ranks, of the first NEAR_STEPS


@dataclass
class Bench:
    """Two hosts with a rank each, an undisturbed run, and what the trials have shown."""

    cluster: Cluster
    disk: Path
    config: Path
    draw: random.Random
    losses: list[float] = field(default_factory=list)
    trials: dict[str, list[Trial]] = field(default_factory=dict)


class Job:
    """A supervised run, started on node0, that has begun to train."""

    def __init__(self, bench: Bench, name: str):
        self.bench, self.directory = bench, bench.disk / name
        self.log = bench.cluster.shared / f"{name}.log"
        launcher = ["deepspeed", "--hostfile", bench.cluster.hostfile(1), "--master_port", str(free_port())]
        run = ["--module", "megatron_tied.pretrain", "--config", bench.config, f"train.run_dir={self.directory}"]
        supervise = [sys.executable, "-m", "megatron_tied.cli.main", "supervise", "--restarts", "2", "--"]
        # The supervisor is of node0, and ends with it.
        self.process = bench.cluster.nodes[0].start([*supervise, *launcher, *run], output=self.log)
        self.wait_for(lambda: self.steps() > 0, "training does not begin", 120)

    def shown(self) -> str:
        return self.log.read_text(errors="replace")

    def steps(self) -> int:
        metrics = self.directory / "metrics.jsonl"
        return metrics.read_bytes().count(b'"loss"') if metrics.exists() else 0

    def rank(self, rank: int) -> psutil.Process:
        """The process that trains as this rank; there is one on each node."""
        found = [
            psutil.Process(pid)
            for pid, words in self.bench.cluster.nodes[rank].processes()
            if "--local_rank=0" in words and "-m megatron_tied.pretrain" in words
        ]
        numbers = {process.pid for process in found}
        (train,) = (process for process in found if process.ppid() not in numbers)
        return train

    def launcher(self) -> psutil.Process:
        """The deepspeed command on node0."""
        return next(
            psutil.Process(pid)
            for pid, words in self.bench.cluster.nodes[0].processes()
            if re.search(r"bin/deepspeed --hostfile", words)
        )

    def wait_for(self, what: Callable[[], bool], otherwise: str, seconds: float) -> float:
        """How long it took."""
        began = time.monotonic()
        while not what():
            assert time.monotonic() - began < seconds, f"{otherwise}:\n{self.shown()[-6000:]}"
            assert self.process.poll() is None or what(), self.shown()[-6000:]
            time.sleep(0.05)
        return time.monotonic() - began


@pytest.fixture(scope="module")
def bench(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    directory = tmp_path_factory.mktemp("faults")
    disk = directory / "shared" / "disk"
    disk.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(disk)], check=True)
    data = directory / "shared" / "data"  # each node has a /tmp of its own
    shutil.copytree(corpus.a.parent, data)
    seen = Corpus(data / corpus.a.name, data / corpus.b.name, data / corpus.tokenizer.name)
    values = config_values(seen, disk / "run")
    values["parallel"] = {"expert_model_parallel_size": 1}  # one rank alone can go on
    values["train"] |= {"steps": STEPS, "eval_every": 0, "liveness_timeout": TIMEOUT}
    values["checkpoint"] = {"save_every": EVERY, "keep_last": 2}
    values["monitor"] = {"tensorboard": False}
    config = directory / "config.yaml"
    config.write_text(json.dumps(values))
    made = None
    try:
        with Cluster(directory, 2) as cluster:
            made = Bench(cluster, disk, config, random.Random(SEED))
            print(f"\nseed {SEED}, {RUNS} runs of each case")
            made.losses = undisturbed(made)
            yield made
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
        if made is not None:
            write_table(made)


def undisturbed(bench: Bench) -> list[float]:
    job = Job(bench, "undisturbed")
    assert job.process.wait(300) == 0, job.shown()[-6000:]
    assert "supervise: " not in job.shown()
    return series(job.directory, "loss")


def try_it(
    bench: Bench, name: str, number: int, fault: Callable[[Job], float | None], *, recovers: bool
) -> tuple[Trial, Job]:
    """One run to its end, with `fault` at a random moment, which says when it was told, if the run `recovers` alone."""
    job = Job(bench, f"{name}_{number}")
    trial = Trial()
    bench.trials.setdefault(name, []).append(trial)
    time.sleep(bench.draw.uniform(0, MOMENTS_SECONDS))
    trial.told_after = fault(job)
    if not recovers:
        began = time.monotonic()
        job.wait_for(lambda: bool(TOLD.search(job.shown()) or RESTART.search(job.shown())), "nothing is told", 90)
        trial.told_after = time.monotonic() - began
        job.wait_for(lambda: bool(BEGINS.search(job.shown())), "it does not go on", 120)
        at = job.steps()
        job.wait_for(lambda: job.steps() != at or job.process.poll() is not None, "it does not train", 60)
        trial.back_after = time.monotonic() - began
    code = job.process.wait(240)
    shown = job.shown()
    assert code == 0, shown[-6000:]
    restarts = RESTART.findall(shown)
    trial.restarts, trial.steps_lost = len(restarts), sum(int(lost) for *_, lost in restarts)
    losses = series(job.directory, "loss")
    assert len(losses) == STEPS
    until = min((int(step) + NEAR_STEPS for _, ranks, step, _ in restarts if ranks == "1"), default=STEPS)
    trial.difference = max(abs(one - other) for one, other in zip(losses[:until], bench.losses[:until], strict=True))
    trial.left = left(bench)
    print(f"{name} {number}: {trial}")
    return trial, job


def left(bench: Bench) -> int:
    """Processes of the run on all nodes; those on the other side of a cut have `TIMEOUT` to end."""
    deadline = time.monotonic() + TIMEOUT + 30
    while True:
        found = [words for node in bench.cluster.nodes for _, words in node.processes() if "megatron_tied" in words]
        if not found or time.monotonic() > deadline:
            assert not found, found
            return len(found)
        time.sleep(0.2)


def assert_told(job: Job, rank: int) -> None:
    """Once, with rank, host, and the step that it had done, or the one before."""
    told = set(TOLD.findall(job.shown()))
    assert len(told) == 1, job.shown()[-6000:]
    ((who, where, step),) = told
    assert (int(who), where) == (rank, f"node{rank}")
    assert 0 <= int(step) <= STEPS


def assert_the_first_host_goes_on_alone(trial: Trial, job: Job) -> None:
    assert_told(job, 1)
    assert RESTART.search(job.shown())[1] == "node0"
    assert trial.told_after < TIMEOUT + 5
    assert trial.restarts == 1
    assert trial.difference < 1e-4


@pytest.mark.parametrize("number", range(RUNS))
def test_a_rank_dies(bench: Bench, number: int) -> None:
    victim = bench.draw.randrange(2)
    trial, job = try_it(bench, "rank dies (SIGKILL)", number, lambda job: job.rank(victim).kill(), recovers=False)
    assert_told(job, victim)
    assert trial.told_after < 5
    assert (trial.restarts, trial.difference) == (1, 0.0)
    assert trial.steps_lost <= 2 * EVERY


@pytest.mark.parametrize("number", range(RUNS))
def test_a_node_dies(bench: Bench, number: int) -> None:
    node = bench.cluster.nodes[1]
    trial, job = try_it(bench, "node dies (power off)", number, lambda job: node.kill(), recovers=False)
    node.boot()
    assert "no answer from node1" in job.shown()
    assert_the_first_host_goes_on_alone(trial, job)


@pytest.mark.parametrize("number", range(RUNS))
def test_a_link_is_cut_for_5_seconds(bench: Bench, number: int) -> None:
    node = bench.cluster.nodes[bench.draw.randrange(2)]

    def cut(job: Job) -> None:
        node.cut()
        time.sleep(5)
        node.mend()

    trial, job = try_it(bench, "link cut for 5 s", number, cut, recovers=True)
    assert not TOLD.search(job.shown())
    assert (trial.restarts, trial.difference) == (0, 0.0)


@pytest.mark.parametrize("number", range(RUNS))
def test_a_link_is_cut_for_good(bench: Bench, number: int) -> None:
    node = bench.cluster.nodes[1]
    trial, job = try_it(bench, "link cut for good", number, lambda job: node.cut(), recovers=False)
    node.mend()
    assert_the_first_host_goes_on_alone(trial, job)


@pytest.mark.parametrize("number", range(RUNS))
def test_a_rank_hangs(bench: Bench, number: int) -> None:
    victim = bench.draw.randrange(2)
    trial, job = try_it(bench, "rank hangs (SIGSTOP)", number, lambda job: job.rank(victim).suspend(), recovers=False)
    assert_told(job, victim)
    assert trial.told_after < TIMEOUT + 5
    assert (trial.restarts, trial.difference) == (1, 0.0)


@pytest.mark.parametrize("number", range(RUNS))
def test_the_disk_fills(bench: Bench, number: int) -> None:
    filler = bench.disk / "filler"

    def fill(job: Job) -> float:
        subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=4k"], capture_output=True, check=False)
        told_after = job.wait_for(lambda: "is NOT SAVED" in job.shown(), "nothing is told", 60)
        filler.unlink()
        return told_after

    trial, job = try_it(bench, "disk fills", number, fill, recovers=True)
    assert "No space left on device" in job.shown()
    assert trial.restarts == 0


@pytest.mark.parametrize("number", range(RUNS))
def test_a_node_is_slow(bench: Bench, number: int) -> None:
    node = bench.cluster.nodes[bench.draw.randrange(2)]

    def slow(job: Job) -> None:
        node.slow(50)
        time.sleep(TIMEOUT + 2)
        node.slow(0)

    trial, job = try_it(bench, "slow node (50 ms each way, 10 s)", number, slow, recovers=True)
    assert not TOLD.search(job.shown())
    assert (trial.restarts, trial.difference) == (0, 0.0)


@pytest.mark.parametrize("number", range(RUNS))
def test_the_coordinator_dies(bench: Bench, number: int) -> None:
    is_launcher = number % 2 == 1
    name = "coordinator dies (launcher)" if is_launcher else "coordinator dies (first rank)"
    fault = (
        (lambda job: job.launcher().kill()) if is_launcher else (lambda job: job.rank(0).send_signal(signal.SIGKILL))
    )
    trial, job = try_it(bench, name, number, fault, recovers=False)
    if not is_launcher:
        assert_told(job, 0)
    assert trial.told_after < 15
    assert (trial.restarts, trial.difference) == (1, 0.0)


def write_table(bench: Bench) -> None:
    """What was measured, as Markdown."""
    lines = [
        "| case | runs | told after, s: median, most | trains again after, s: most | steps lost: most | restarts "
        "| losses differ by | processes left |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, trials in bench.trials.items():
        told = [trial.told_after for trial in trials if trial.told_after is not None]
        back = [trial.back_after for trial in trials if trial.back_after is not None]
        cells = [
            name,
            len(trials),
            f"{statistics.median(told):.1f}, {max(told):.1f}" if told else "nothing to tell",
            f"{max(back):.0f}" if back else "goes on",
            max(trial.steps_lost for trial in trials),
            ", ".join(map(str, sorted({trial.restarts for trial in trials}))),
            f"{max(trial.difference for trial in trials):.1g}",
            sum(trial.left for trial in trials),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    table = "\n".join(lines)
    print(f"\nseed {SEED}\n{table}")
    if path := os.environ.get("FAULT_TABLE"):
        Path(path).write_text(table + "\n")
