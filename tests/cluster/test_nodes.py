"""The nodes are hosts: names, addresses and disks of their own, links that fail as links do, no goodbye when killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.cluster import Cluster, Node, needs_cluster
from tests.training.runs import ROOT

pytestmark = needs_cluster

# Prints a line five times a second, for two seconds.
_TALK = "for number in $(seq 10); do echo $number; sleep 0.2; done"
_ROUND_TRIP = """
import socket, sys, time
begin = time.monotonic()
socket.create_connection((sys.argv[1], 22)).close()
print(time.monotonic() - begin)
"""
_ABANDONED = """
import sys, time
from pathlib import Path
from tests.cluster.cluster import Cluster
with Cluster(Path(sys.argv[1]), 2) as cluster:
    cluster.nodes[1].slow(1)
    cluster.nodes[0].start(["ssh", "node1", "sleep 600"])
    time.sleep(1)
    print("up", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster"), 2) as made:
        yield made


def answers(node: Node, other: Node) -> bool:
    return node.run(["ssh", "-o", "ConnectTimeout=1", other.name, "true"]).code == 0


def round_trip(node: Node, other: Node) -> float:
    return float(node.run([sys.executable, "-c", _ROUND_TRIP, other.name]).output)


def lines_after(path: Path, lines: int, patience: float) -> int:
    """How many lines there are when there are that many, or at the end of patience."""
    deadline = time.monotonic() + patience
    while (there := len(path.read_text().splitlines())) < lines and time.monotonic() < deadline:
        time.sleep(0.02)
    return there


def test_names_and_addresses(cluster: Cluster) -> None:
    done = cluster.nodes[0].run(["pdsh", "-R", "ssh", "-w", "node0,node1", "hostname; hostname -I"])
    told = [line.strip() for line in sorted(done.output.splitlines())]
    assert told == ["node0: 10.77.0.1", "node0: node0", "node1: 10.77.0.2", "node1: node1"]
    assert cluster.hostfile(slots=2).read_text() == "node0 slots=2\nnode1 slots=2\n"


def test_disks(cluster: Cluster) -> None:
    first, second = cluster.nodes
    places = [cluster.local, Path("/tmp"), Path.home(), Path("/dev/shm"), cluster.shared]
    write = "; ".join(f"echo from node0 > {place}/mark" for place in places)
    assert first.run(["sh", "-c", write]).code == 0
    seen = [second.run(["cat", place / "mark"]).code == 0 for place in places]
    assert seen == [False, False, False, False, True]
    assert (first.local / "mark").exists()
    assert (cluster.shared / "mark").exists()
    assert not Path("/tmp/mark").exists()


def test_signals_and_exit_codes(cluster: Cluster) -> None:
    node = cluster.nodes[0]
    assert node.run(["sh", "-c", "exit 3"]).code == 3
    waiting = node.start(
        ["sh", "-c", "trap 'exit 7' TERM; echo begun; while :; do sleep 0.05; done"], output=subprocess.PIPE
    )
    assert waiting.stdout.readline() == "begun\n"
    waiting.terminate()
    assert waiting.wait(10) == 7
    killed = node.start(["sleep", "600"])
    while not node.processes():
        time.sleep(0.01)
    [(pid, command)] = node.processes()
    assert command == "sleep 600"
    assert psutil.Process(pid).name() == "sleep"
    killed.kill()
    psutil.Process(pid).wait(10)


def test_cut_and_mended(cluster: Cluster, tmp_path: Path) -> None:
    first, second = cluster.nodes
    shown = tmp_path / "shown"
    talk = first.start(["ssh", "node1", _TALK], output=shown)
    before = lines_after(shown, 2, 10)
    second.cut()
    time.sleep(0.1)  # what was on its way
    cut_at = len(shown.read_text().splitlines())
    assert not answers(first, second)
    assert len(shown.read_text().splitlines()) == cut_at < 10
    assert talk.poll() is None, "a cut must not end a connection"
    second.mend()
    assert talk.wait(20) == 0
    assert shown.read_text().split() == [str(number) for number in range(1, 11)]
    assert before >= 2
    assert answers(first, second)


def test_slow(cluster: Cluster) -> None:
    first, second = cluster.nodes
    fast = round_trip(first, second)
    second.slow(40)
    try:
        assert 0.08 <= round_trip(first, second) < 0.08 + 0.1
        # Whole frames, checksums and all, whatever the cards leave to each other otherwise.
        much = "head -c 3000000 /dev/urandom | tee {} | md5sum"
        summed = first.run(["ssh", "node1", much.format(cluster.local / "much")]).output.split()[0]
        assert first.run(["sh", "-c", f"ssh node1 cat {cluster.local}/much | md5sum"]).output.split()[0] == summed
    finally:
        second.slow(0)
    assert round_trip(first, second) < 0.08
    assert fast < 0.08


def test_slow_and_cut(cluster: Cluster) -> None:
    first, second = cluster.nodes
    second.slow(1)
    second.cut()
    assert not answers(first, second)
    second.mend()
    assert answers(first, second)
    second.slow(0)
    assert answers(first, second)


def test_killed_and_booted(cluster: Cluster, tmp_path: Path) -> None:
    first, second = cluster.nodes
    (second.local / "kept").write_text("")
    second.start(["setsid", "sleep", "600"])
    talk = first.start(["ssh", "node1", "sleep 600"])
    while len(second.processes()) < 2:
        time.sleep(0.01)
    doomed = [psutil.Process(pid) for pid, _ in second.processes()]
    second.kill()
    assert not any(process.is_running() for process in doomed)
    assert second.processes() == []
    assert not answers(first, second)
    assert talk.poll() is None, "a node without power says no goodbye"
    talk.kill()
    second.boot()
    assert answers(first, second)
    assert second.run(["test", "-e", cluster.local / "kept"]).code == 0


def test_nothing_outlives_the_test(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _ABANDONED, str(tmp_path)]
    killed = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    while (line := killed.stdout.readline()) != "up\n":
        assert line, "no cluster"
    started = psutil.Process(killed.pid).children(recursive=True)
    assert sum(process.name() == "sshd" for process in started) >= 2
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    _, alive = psutil.wait_procs(started, timeout=10)
    assert alive == []
    mounted = Path("/proc/mounts").read_text()
    assert str(tmp_path) not in mounted
