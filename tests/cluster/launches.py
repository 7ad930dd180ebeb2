"""Training on the nodes of a cluster, started by the scripts in examples/multinode."""

from __future__ import annotations

import json
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from tests.cluster.cluster import Cluster
from tests.training.runs import ROOT, Corpus, Finished, config_values, finish, free_port, series

SCRIPTS = ROOT / "examples" / "multinode"


def share(corpus: Corpus, cluster: Cluster) -> Corpus:
    """The same data where all nodes see it."""
    place = cluster.shared / "corpus"
    shutil.copytree(corpus.a.parent, place, dirs_exist_ok=True)
    return Corpus(place / corpus.a.name, place / corpus.b.name, place / corpus.tokenizer.name)


def write_config(cluster: Cluster, corpus: Corpus, name: str, *, experts_parallel: int = 2) -> Path:
    """Four steps of a tiny model; the run directory `name` is in the shared directory, beside the config."""
    values = config_values(corpus, cluster.shared / name)
    values["train"] |= {"steps": 4, "eval_every": 0}
    values["parallel"] = {"expert_model_parallel_size": experts_parallel}
    path = cluster.shared / f"{name}.yaml"
    path.write_text(json.dumps(values))
    return path


def write_hostfile(cluster: Cluster, hosts: int, slots: int) -> Path:
    """A hostfile of the first `hosts` nodes."""
    path = cluster.shared / f"hostfile-{hosts}x{slots}"
    path.write_text("".join(f"{node.name} slots={slots}\n" for node in cluster.nodes[:hosts]))
    return path


def make_quickstart_data(directory: Path) -> Path:
    """The corpus of examples/quickstart.sh, a part of it: the prefix, beside which is the tokenizer."""
    prefix, library = directory / "stdlib", Path(sysconfig.get_path("stdlib"))
    sources = [str(path) for path in sorted(library.glob("*.py"))]
    command = [sys.executable, "-m", "megatron_tied.cli.main", "prepare-data", "--input", *sources]
    done = finish([*command, "--output", str(prefix), "--train-tokenizer", "--vocab-size", "4096"])
    assert done.code == 0, done.output
    return prefix


def on_every_node(cluster: Cluster, command: Callable[[int], list[str | Path]], env: dict[str, str]) -> list[Finished]:
    """Run `command(number)` on every node at once, to their ends."""
    logs = [cluster.directory / f"{node.name}.log" for node in cluster.nodes]
    for log in logs:
        log.unlink(missing_ok=True)
    jobs = [
        node.start(command(number), env, log)
        for number, (node, log) in enumerate(zip(cluster.nodes, logs, strict=True))
    ]
    try:
        return [Finished(job.wait(300), log.read_text()) for job, log in zip(jobs, logs, strict=True)]
    finally:
        for job in jobs:
            job.kill()


def port() -> dict[str, str]:
    """An environment with a port for ranks to meet on."""
    return {"MASTER_PORT": str(free_port())}


def losses(run_dir: Path) -> dict[str, list[float]]:
    """What two runs that are the same have in common, to the last bit."""
    return {name: series(run_dir, name) for name in ("loss", "lm_loss", "aux_loss", "grad_norm")}
