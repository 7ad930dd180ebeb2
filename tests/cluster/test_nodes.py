"""The nodes are hosts: names, addresses and disks of their own, links that fail as links do, no goodbye when killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.cluster.cluster import Cluster, Node, needs_cluster
from tests.training.runs import ROOT

pytestmark = needs_cluster

# For what comes in a moment, on a machine that has much else to do.
_PATIENCE_SECONDS = 120
# Notes a number and says it, about five times a second, until it is told that it is enough.
_TALK = """
number=0
while [ ! -e {enough} ]; do
  number=$((number + 1)); echo $number >> {said}; echo $number; sleep 0.2
done
"""
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


def answers(node: Node, other: Node, seconds: int = _PATIENCE_SECONDS) -> bool:
    return node.run(["ssh", "-o", f"ConnectTimeout={seconds}", other.name, "true"]).code == 0


def is_silent(node: Node, other: Node) -> bool:
    return not answers(node, other, seconds=2)


def round_trip(node: Node, other: Node) -> float:
    """The shortest of several: whatever else runs here makes them longer only."""
    tried = (node.run([sys.executable, "-c", _ROUND_TRIP, other.name]) for _ in range(5))
    return min(float(done.output) for done in tried)


def lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < deadline, f"still not after {_PATIENCE_SECONDS} s"
        time.sleep(0.02)


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
    assert waiting.wait(_PATIENCE_SECONDS) == 7
    killed = node.start(["sleep", "600"])
    wait_until(lambda: [command for _, command in node.processes()] == ["sleep 600"])
    [(pid, _)] = node.processes()
    assert psutil.Process(pid).name() == "sleep"
    killed.kill()
    psutil.Process(pid).wait(_PATIENCE_SECONDS)


def test_cut_and_mended(cluster: Cluster, tmp_path: Path) -> None:
    first, second = cluster.nodes
    shown, said = tmp_path / "shown", second.local / "said"
    talk = first.start(
        ["ssh", "node1", _TALK.format(said=cluster.local / "said", enough=cluster.local / "enough")], output=shown
    )
    wait_until(lambda: lines(shown) >= 2)
    second.cut()
    before = lines(said)  # of these some may have been on their way
    wait_until(lambda: lines(said) >= before + 5)
    assert is_silent(first, second)
    assert lines(shown) <= before
    assert talk.poll() is None, "a cut must not end a connection"
    second.mend()
    wait_until(lambda: lines(shown) >= before + 5)
    (second.local / "enough").write_text("")
    assert talk.wait(_PATIENCE_SECONDS) == 0
    assert shown.read_text() == said.read_text() == "".join(f"{number}\n" for number in range(1, lines(said) + 1))
    assert answers(first, second)


def test_slow(cluster: Cluster) -> None:
    first, second = cluster.nodes
    assert round_trip(first, second) < 0.2
    second.slow(100)
    try:
        assert round_trip(first, second) >= 0.2
        # Whole frames, checksums and all, whatever the cards leave to each other otherwise.
        much = "head -c 3000000 /dev/urandom | tee {} | md5sum"
        summed = first.run(["ssh", "node1", much.format(cluster.local / "much")]).output.split()[0]
        assert first.run(["sh", "-c", f"ssh node1 cat {cluster.local}/much | md5sum"]).output.split()[0] == summed
    finally:
        second.slow(0)
    assert round_trip(first, second) < 0.2


def test_slow_and_cut(cluster: Cluster) -> None:
    first, second = cluster.nodes
    second.slow(1)
    second.cut()
    assert is_silent(first, second)
    second.mend()
    assert answers(first, second)
    second.slow(0)
    assert answers(first, second)


def test_killed_and_booted(cluster: Cluster, tmp_path: Path) -> None:
    first, second = cluster.nodes
    (second.local / "kept").write_text("")
    second.start(["setsid", "sleep", "600"])
    talk = first.start(["ssh", "node1", "sleep 600"])
    wait_until(lambda: len(second.processes()) >= 2)
    doomed = [psutil.Process(pid) for pid, _ in second.processes()]
    second.kill()
    assert not any(process.is_running() for process in doomed)
    assert second.processes() == []
    assert is_silent(first, second)
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
    _, alive = psutil.wait_procs(started, timeout=_PATIENCE_SECONDS)
    assert alive == []
    mounted = Path("/proc/mounts").read_text()
    assert str(tmp_path) not in mounted
