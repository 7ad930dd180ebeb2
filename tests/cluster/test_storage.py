"""File systems that are not shared: what each node may have for itself, and what is said when it may not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, needs_cluster
from tests.cluster.launches import SCRIPTS, port
from tests.training.runs import Corpus, Finished, config_values

_NOT_SHARED = "must be in a file system that all ranks share: checkpoints there are not seen"

pytestmark = [needs_cluster, pytest.mark.slow]


@pytest.fixture
def local(corpus: Corpus, cluster: Cluster) -> Corpus:
    """The same data on the disk of each node, under one name."""
    place = cluster.local / "corpus"
    for node in cluster.nodes:
        shutil.rmtree(node.local / "corpus", ignore_errors=True)
        shutil.copytree(corpus.a.parent, node.local / "corpus")
    return Corpus(place / corpus.a.name, place / corpus.b.name, place / corpus.tokenizer.name)


def train(cluster: Cluster, corpus: Corpus, run_dir: Path, *overrides: str) -> Finished:
    values = config_values(corpus, run_dir)
    values["train"] |= {"steps": 3, "eval_every": 0}
    config = cluster.shared / "config.yaml"
    config.write_text(json.dumps(values))
    command = ["bash", SCRIPTS / "pdsh.sh", cluster.hostfile(1), config, *overrides]
    return cluster.nodes[0].run(command, port())


def problems(done: Finished) -> str:
    """What was said, once, and by whom does not matter."""
    assert done.code == 2, done.output
    assert "Traceback" not in done.output, done.output
    assert done.output.count("error: 1 problem in the input") == 1, done.output
    return done.output.partition("error: 1 problem in the input")[2].splitlines()[1]


def test_checkpoints_on_a_disk_of_the_first_node(cluster: Cluster, shared: Corpus) -> None:
    run = cluster.local / "first"
    told = problems(train(cluster, shared, run, "checkpoint.save_every=1"))
    assert told.endswith(f"  train.run_dir = '{run}': {_NOT_SHARED} (on node1)")


def test_checkpoints_on_disks_that_look_alike(cluster: Cluster, shared: Corpus) -> None:
    run = cluster.local / "alike"
    for node in cluster.nodes:
        (node.local / "alike" / "checkpoints").mkdir(parents=True)
    told = problems(train(cluster, shared, run, "checkpoint.save_every=1"))
    assert told.endswith(f"  train.run_dir = '{run}': {_NOT_SHARED} (on node1)")
    assert [list((node.local / "alike" / "checkpoints").iterdir()) for node in cluster.nodes] == [[], []]


def test_without_checkpoints_only_the_first_node_writes(cluster: Cluster, shared: Corpus) -> None:
    done = train(cluster, shared, cluster.local / "alone", "checkpoint.save_every=0")
    assert done.code == 0, done.output
    assert [(node.local / "alone" / "summary.json").exists() for node in cluster.nodes] == [True, False]


def test_data_on_every_node_with_indices_that_are_shared(cluster: Cluster, local: Corpus) -> None:
    os.utime(cluster.nodes[1].local / "corpus" / "a.idx", (1, 1))  # a copy has another time
    cache = f"data.cache_dir={cluster.shared / 'cache'}"
    for run in ("fresh-indices", "ready-indices"):
        done = train(cluster, local, cluster.shared / run, cache)
        assert done.code == 0, done.output
    assert len(list((cluster.shared / "cache").iterdir())) == 1


def test_data_on_every_node_with_indices_beside_it(cluster: Cluster, local: Corpus) -> None:
    told = problems(train(cluster, local, cluster.shared / "local-indices"))
    assert "data.cache_dir" in told
    assert "must be in a file system that all ranks share" in told


def test_data_on_one_node(cluster: Cluster, local: Corpus) -> None:
    (cluster.nodes[1].local / "corpus" / "a.bin").unlink()
    told = problems(train(cluster, local, cluster.shared / "missing-data"))
    assert f"data.train = '{local.a}': needs the file {local.a}.bin" in told
    assert told.endswith(" (on node1)")
