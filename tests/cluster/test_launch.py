"""Hosts train together: by each way of starting them the losses are those of one host, bit for bit."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, needs_cluster
from tests.cluster.launches import (
    SCRIPTS,
    losses,
    make_quickstart_data,
    on_every_node,
    port,
    share,
    write_config,
    write_hostfile,
)
from tests.training.runs import ROOT, Corpus, Finished

pytestmark = needs_cluster

NIC = {"NIC": "eth0"}


@pytest.fixture(scope="module")
def one_host(cluster: Cluster, shared: Corpus) -> dict[str, list[float]]:
    """The losses of both ranks on one host."""
    config = write_config(cluster, shared, "one-host")
    done = cluster.nodes[0].run(["bash", SCRIPTS / "pdsh.sh", write_hostfile(cluster, 1, 2), config], port())
    assert done.code == 0, done.output
    return losses(cluster.shared / "one-host")


def check(done: Finished, run_dir: Path, one_host: dict[str, list[float]]) -> None:
    assert done.code == 0, done.output
    assert len(one_host["loss"]) == 4
    assert losses(run_dir) == one_host


def test_pdsh(cluster: Cluster, shared: Corpus, one_host: dict[str, list[float]]) -> None:
    config = write_config(cluster, shared, "pdsh")
    done = cluster.nodes[0].run(["bash", SCRIPTS / "pdsh.sh", cluster.hostfile(1), config], port())
    check(done, cluster.shared / "pdsh", one_host)
    assert {line.split(":")[0] for line in done.output.splitlines() if line.startswith("node")} == {"node0", "node1"}
    assert [node.processes() for node in cluster.nodes] == [[], []]


@pytest.mark.slow
def test_ssh(cluster: Cluster, shared: Corpus, one_host: dict[str, list[float]]) -> None:
    config = write_config(cluster, shared, "ssh")
    done = cluster.nodes[0].run(["bash", SCRIPTS / "ssh.sh", cluster.hostfile(1), config], NIC | port())
    check(done, cluster.shared / "ssh", one_host)


@pytest.mark.slow
def test_no_ssh(cluster: Cluster, shared: Corpus, one_host: dict[str, list[float]]) -> None:
    config = write_config(cluster, shared, "no-ssh")
    script = ["bash", SCRIPTS / "no_ssh.sh"]
    done = on_every_node(cluster, lambda number: [*script, str(number), cluster.hostfile(1), config], NIC | port())
    check(done[1], cluster.shared / "no-ssh", one_host)
    check(done[0], cluster.shared / "no-ssh", one_host)


@pytest.mark.slow
def test_torchrun(cluster: Cluster, shared: Corpus, one_host: dict[str, list[float]]) -> None:
    config = write_config(cluster, shared, "torchrun")
    script = ["bash", SCRIPTS / "torchrun.sh"]
    env = {"MASTER_ADDR": "node0"} | NIC | port()
    done = on_every_node(cluster, lambda number: [*script, str(number), "2", "1", config], env)
    check(done[1], cluster.shared / "torchrun", one_host)
    check(done[0], cluster.shared / "torchrun", one_host)


@pytest.mark.slow
def test_a_host_whose_name_means_loopback_to_itself(
    cluster: Cluster, shared: Corpus, one_host: dict[str, list[float]]
) -> None:
    # As Debian's installer writes /etc/hosts.
    before = [node.hosts.read_text() for node in cluster.nodes]
    for node, hosts in zip(cluster.nodes, before, strict=True):
        node.hosts.write_text(hosts.replace(f"{node.address} {node.name}\n", f"127.0.1.1 {node.name}\n"))
    try:
        config = write_config(cluster, shared, "debian")
        script = ["bash", SCRIPTS / "no_ssh.sh"]
        refused = on_every_node(cluster, lambda number: [*script, str(number), cluster.hostfile(1), config], port())
        done = on_every_node(cluster, lambda number: [*script, str(number), cluster.hostfile(1), config], NIC | port())
    finally:
        for node, hosts in zip(cluster.nodes, before, strict=True):
            node.hosts.write_text(hosts)
    for node, output in zip(cluster.nodes, refused, strict=True):
        assert f"{node.name}'s own name means 127.0.1.1 to it, which no other host reaches" in output.output
    check(done[0], cluster.shared / "debian", one_host)


@pytest.mark.slow
@pytest.mark.parametrize("told", [True, False], ids=["told to end", "a host fails"])
def test_ssh_ends_on_all_hosts(cluster: Cluster, shared: Corpus, told: bool, tmp_path: Path) -> None:
    name = "told" if told else "failed"
    config, log = write_config(cluster, shared, name), tmp_path / "log"
    steps = ["train.steps=100000", "checkpoint.save_every=100000"]
    job = cluster.nodes[0].start(["bash", SCRIPTS / "ssh.sh", cluster.hostfile(1), config, *steps], NIC | port(), log)
    metrics, deadline = cluster.shared / name / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size):
        assert job.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    if told:
        job.terminate()
    else:
        for pid, command in cluster.nodes[1].processes():
            if "megatron_tied.pretrain" in command:
                os.kill(pid, signal.SIGKILL)
    code = job.wait(90)
    assert code != 0
    assert [node.processes() for node in cluster.nodes] == [[], []]
    if told:
        assert code == 143
        assert "received SIGTERM, saving" in log.read_text()
        assert len(list((cluster.shared / name / "checkpoints").glob("step_*"))) == 1


@pytest.mark.slow
def test_four_hosts(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> None:
    with Cluster(tmp_path_factory.mktemp("four"), 4) as four:
        data = share(corpus, four)
        found = []
        for hosts in (1, 2, 4):
            name, hostfile = f"on-{hosts}", write_hostfile(four, hosts, 4 // hosts)
            config = write_config(four, data, name, experts_parallel=4)
            done = four.nodes[0].run(["bash", SCRIPTS / "pdsh.sh", hostfile, config], port(), timeout=400)
            assert done.code == 0, done.output
            found.append(losses(four.shared / name))
        assert len(found[0]["loss"]) == 4
        assert found[1] == found[0]
        assert found[2] == found[0]


@pytest.mark.slow
def test_quickstart(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The config of examples/quickstart.sh, on a part of its corpus, with a few steps."""
    steps = 5
    with Cluster(tmp_path_factory.mktemp("quickstart"), 4) as four:
        data = make_quickstart_data(four.shared)
        common = [f"data.train={data}", f"data.tokenizer={data}.model", f"train.steps={steps}", "train.log_every=1"]
        common += ["optimizer.warmup_steps=2", "checkpoint.save_every=0", "train.eval_every=0"]
        for world, spread in ((2, (1, 2)), (4, (1, 2, 4))):
            found = []
            for hosts in spread:
                hostfile, run = write_hostfile(four, hosts, world // hosts), four.shared / f"{world}-on-{hosts}"
                overrides = [*common, f"train.run_dir={run}", f"parallel.expert_model_parallel_size={world}"]
                overrides.append(f"train.global_batch_size={4 * world}")  # of micro_batch_size 4, one for each rank
                command = ["bash", SCRIPTS / "pdsh.sh", hostfile, ROOT / "examples" / "quickstart.yaml", *overrides]
                done = four.nodes[0].run(command, port(), timeout=500)
                assert done.code == 0, done.output
                found.append(losses(run))
                print(f"{world} ranks on {hosts} hosts: losses {found[-1]['loss']}")
            assert len(found[0]["loss"]) == steps
            assert all(each == found[0] for each in found[1:])
