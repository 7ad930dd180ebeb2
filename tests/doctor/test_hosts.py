"""`doctor` and `--preflight` on two hosts with networks, clocks and disks of their own, a fault planted on one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_tied.doctor.findings import Finding, Level
from tests.cluster.cluster import Cluster, Node, needs_cluster
from tests.training.runs import Corpus, Finished, config_values, free_port

pytestmark = [pytest.mark.slow, needs_cluster]

_FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
_WAIT_SECONDS = 120
PYTHON = sys.executable


class Hosts(NamedTuple):
    """Two nodes with two slots each, and the config of a run over both."""

    cluster: Cluster
    config: Path

    @property
    def second(self) -> Node:
        return self.cluster.nodes[1]

    def doctor(self, *options: str, hostfile: Path | None = None) -> tuple[int, list[Finding], str]:
        """Exit code, findings and all output of the command on the first node."""
        command = [PYTHON, "-m", "megatron_tied.cli.main", "doctor", "--json", "--wait", str(_WAIT_SECONDS)]
        command += ["--hostfile", str(hostfile or self.cluster.hostfile(2)), "--config", str(self.config), *options]
        done = self.cluster.nodes[0].run(command, timeout=300)
        assert "{\n" in done.output, done.output
        told, _ = json.JSONDecoder().raw_decode(done.output, done.output.index("{\n"))
        assert told["passed"] == (done.code == 0)
        return done.code, [Finding.from_json(finding) for finding in told["findings"]], done.output

    def pretrain(self, *options: str) -> Finished:
        """The run of two steps, under the launcher, with a preflight."""
        command = [str(Path(PYTHON).with_name("deepspeed")), "--hostfile", str(self.cluster.hostfile(2)), *options]
        command += ["--module", "megatron_tied.pretrain", "--preflight", "--config", str(self.config)]
        return self.cluster.nodes[0].run(command, timeout=300)


@pytest.fixture(scope="module")
def hosts(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Cluster(tmp_path_factory.mktemp("doctor"), 2) as cluster:
        values = config_values(corpus, cluster.shared / "runs" / "run")
        for file in corpus.a.parent.glob("a.*"):
            shutil.copy(file, cluster.shared)
        values["data"] |= {"train": str(cluster.shared / "a"), "tokenizer": str(cluster.shared / "a.model")}
        values["train"] |= {"steps": 2, "eval_every": 0}
        values["optimizer"] = {"warmup_steps": 0}
        values["checkpoint"] = {"save_every": 2}
        (cluster.shared / "runs").mkdir()
        config = cluster.shared / "config.yaml"
        config.write_text(json.dumps(values))
        yield Hosts(cluster, config)


@contextmanager
def done_and_undone(node: Node, do: str, undo: str) -> Iterator[None]:
    """A fault for as long as the context lasts: two lines of shell, as root of the node."""
    done = node.run(["bash", "-euc", do])
    assert done.code == 0, done.output
    try:
        yield
    finally:
        undone = node.run(["bash", "-euc", undo])
        assert undone.code == 0, undone.output


def covered(node: Node, file: Path, content: bytes) -> AbstractContextManager[None]:
    """Another content of `file` on this node alone."""
    other = node.local / file.name
    other.write_bytes(content)
    return done_and_undone(node, f"mount --bind {other} {file}", f"umount {file}")


def errors(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level is Level.ERROR]


def test_sound_hosts(hosts: Hosts) -> None:
    code, findings, output = hosts.doctor()
    assert (code, errors(findings)) == (0, []), output
    assert findings[0].what == "4 ranks on 2 hosts, each reaches every other one"
    told = {finding.check: finding for finding in findings}
    assert told["expert groups"].what.startswith("each of the 2 groups of 2 ranks lies inside a host")
    assert told["clock"].level is Level.OK
    assert "GB/s at 16 MiB" in output
    assert "at the slowest, node0, node1" in output
    assert not list(hosts.cluster.shared.rglob(".doctor*"))


def test_expert_groups_across_hosts(hosts: Hosts) -> None:
    code, findings, _ = hosts.doctor("parallel.expert_model_parallel_size=4")
    assert code == 0
    (finding,) = (finding for finding in findings if finding.check == "expert groups")
    assert (finding.level, finding.hosts) == (Level.WARNING, ("node0", "node1"))


def test_another_version(hosts: Hosts) -> None:
    file = Path(str(metadata.distribution("deepspeed").locate_file("")), "deepspeed-{}.dist-info", "METADATA")
    file = Path(str(file).format(metadata.version("deepspeed")))
    content = file.read_bytes().replace(b"\nVersion: ", b"\nVersion: 0.19.99\nWas: ", 1)
    with covered(hosts.second, file, content):
        code, findings, _ = hosts.doctor()
    (finding,) = errors(findings)
    assert (code, finding.check) == (1, "versions")
    assert finding.what.startswith("deepspeed differs: ")
    assert "0.19.99 on node1" in finding.what


def test_another_data_set(hosts: Hosts) -> None:
    file = hosts.cluster.shared / "a.bin"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    with covered(hosts.second, file, bytes(content)):
        code, findings, _ = hosts.doctor()
    (finding,) = errors(findings)
    assert (code, finding.check) == (1, "data")
    assert finding.what.startswith(f"{file}: ")
    assert finding.what.endswith("on node1")


def test_a_blocked_master_port(hosts: Hosts) -> None:
    rule = "from all ipproto tcp dport 29500 blackhole"
    with done_and_undone(hosts.second, f"ip rule add {rule}", f"ip rule del {rule}"):
        begin = time.monotonic()
        code, findings, _ = hosts.doctor()
        assert time.monotonic() - begin < 3 * _WAIT_SECONDS + 120
    assert code == 1
    of_the_second, of_the_first = sorted(errors(findings), key=lambda finding: finding.hosts == ())
    assert of_the_second.what.startswith("node1 cannot connect to 10.77.")
    assert of_the_second.hosts == ("node1",)
    assert of_the_first.what.startswith("2 of 4 ranks have not come to 10.77.")
    assert of_the_first.what.endswith(": 2, 3; there are those of node0")


def test_answers_that_are_dropped(hosts: Hosts) -> None:
    rule = "from all ipproto tcp sport 29500 blackhole"
    with done_and_undone(hosts.cluster.nodes[0], f"ip rule add {rule}", f"ip rule del {rule}"):
        code, findings, _ = hosts.doctor()
    assert code == 1
    assert any("no answer" in finding.what and finding.hosts == ("node1",) for finding in errors(findings))


def test_blocked_ports_of_collectives(hosts: Hosts) -> None:
    rule = "from all ipproto tcp sport 1024-65534 dport 32768-60999 blackhole"  # not what sshd answers
    with done_and_undone(hosts.second, f"ip rule add {rule}", f"ip rule del {rule}"):
        code, findings, _ = hosts.doctor()
    assert code == 1
    told = [finding.what for finding in errors(findings)]
    assert any(
        what.startswith("node1 cannot connect to other hosts on the ports that collectives choose") and "node0" in what
        for what in told
    ), told


def test_a_master_port_that_is_taken(hosts: Hosts) -> None:
    port = free_port()
    listen = (
        f"import socket, time; server = socket.create_server(('', {port})); print('up', flush=True); time.sleep(600)"
    )
    taken = hosts.cluster.nodes[0].start([PYTHON, "-c", listen], output=subprocess.PIPE)
    try:
        assert taken.stdout.readline() == "up\n"
        code, findings, _ = hosts.doctor("--master_port", str(port))
    finally:
        taken.kill()
        taken.wait()
    assert code == 1
    assert any(f"MASTER_PORT {port} must be free on node0" in finding.what for finding in errors(findings))


def test_a_full_disk(hosts: Hosts) -> None:
    runs = hosts.cluster.shared / "runs"
    fill = f"mount -t tmpfs -o size=1m full {runs}; dd if=/dev/zero of={runs}/full bs=4k count=250 status=none"
    with done_and_undone(hosts.second, fill, f"umount {runs}"):
        code, findings, _ = hosts.doctor()
    disk, shared = sorted(errors(findings), key=lambda finding: finding.check)
    assert (code, disk.check, disk.hosts) == (1, "disk", ("node1",))
    assert f"{runs}/run/checkpoints: 0.0 MB free, and checkpoints take 0.8 MB" in disk.what
    # It is another disk, too.
    assert (shared.check, shared.hosts) == ("shared", ("node1",))


@pytest.mark.skipif(_FAKETIME is None, reason="needs libfaketime (Debian's package faketime)")
def test_a_skewed_clock(hosts: Hosts) -> None:
    # What sshd's shell reads before it starts the node's launcher; sshd itself would not bear it.
    profile = hosts.second.home / ".bashrc"
    profile.write_text(f"export LD_PRELOAD={_FAKETIME} FAKETIME=+90s\n")
    try:
        code, findings, _ = hosts.doctor()
    finally:
        profile.unlink()
    (clock,) = (finding for finding in findings if finding.check == "clock")
    assert code == 0  # it is no reason not to train
    assert (clock.level, clock.hosts) == (Level.WARNING, ("node1",))
    assert 60 < float(clock.what.removeprefix("node1 is ").split()[0]) < 120, clock.what
    assert "ahead of the others" in clock.what


def test_a_host_that_is_not_there(hosts: Hosts) -> None:
    hostfile = hosts.cluster.shared / "three"
    hostfile.write_text("node0 slots=1\nnode1 slots=1\nnode7 slots=2\n")
    code, findings, output = hosts.doctor(hostfile=hostfile)
    assert code == 1
    assert any("2 of 4 ranks have not come" in finding.what for finding in errors(findings)), output
    assert "node7" in output


def test_a_preflight_that_finds_something(hosts: Hosts) -> None:
    file = hosts.cluster.shared / "a.bin"
    with covered(hosts.second, file, file.read_bytes()[:-2] + b"\1\1"):
        done = hosts.pretrain()
    assert done.code == 2, done.output
    assert done.output.count("✗ data: ") == 1
    assert not (hosts.cluster.shared / "runs/run").exists()


def test_a_preflight_behind_a_blocked_port(hosts: Hosts) -> None:
    rule = "from all ipproto tcp dport 29500 blackhole"
    with done_and_undone(hosts.second, f"ip rule add {rule}", f"ip rule del {rule}"):
        done = hosts.pretrain()
    assert done.code == 2, done.output
    assert "node1 cannot connect to 10.77." in done.output
    assert "2 of 4 ranks have not come" in done.output


def test_training_after_a_preflight(hosts: Hosts) -> None:
    done = hosts.pretrain()
    assert done.code == 0, done.output
    assert "4 ranks on 2 hosts" in done.output
    assert (hosts.cluster.shared / "runs/run/summary.json").exists()
