"""The scripts and manifests of examples/multinode call what exists, with options that it has."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import deepspeed
import pytest
import torch
import yaml
from deepspeed.launcher import runner
from torch.distributed import run as torchrun

from megatron_tied.doctor.hostfile import read_hostfile
from megatron_tied.pretrain import read_arguments
from tests.cluster.launches import SCRIPTS

_SHELL = [*sorted(SCRIPTS.glob("*.sh")), SCRIPTS / "slurm.sbatch"]
_OVERRIDES = ["train.steps=5", 'model.description="two words"']


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
@pytest.mark.parametrize("script", _SHELL, ids=lambda script: script.name)
def test_shell(script: Path) -> None:
    done = subprocess.run(["shellcheck", "-x", script], stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout
    if script.name != "environment.sh":
        assert "\nset -euo pipefail\n" in script.read_text()


def called(tmp_path: Path, script: str, *arguments: object, **environment: str) -> dict[str, list[str]]:
    """The arguments that `script` hands to each launcher it starts."""
    for name in ("deepspeed", "torchrun"):
        stand_in = tmp_path / name
        write = f"import json, sys; open({str(tmp_path / name)!r} + '.json', 'w').write(json.dumps(sys.argv[1:]))"
        stand_in.write_text(f"#!{sys.executable}\n{write}\n")
        stand_in.chmod(0o755)
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **environment}
    command = ["bash", str(SCRIPTS / script), *map(str, arguments)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}


def check_training(arguments: argparse.Namespace, name: str, rest: list[str]) -> None:
    """It is our module that is started, with the config and every override as it was."""
    assert arguments.module is True
    assert name == "megatron_tied.pretrain"
    ours = read_arguments(rest)
    assert ours.config == "run.yaml"
    assert ours.overrides == _OVERRIDES


@pytest.mark.parametrize("script", ["pdsh.sh", "no_ssh.sh"])
def test_deepspeed(script: str, tmp_path: Path) -> None:
    number = [1] if script == "no_ssh.sh" else []
    found = called(tmp_path, script, *number, SCRIPTS / "hostfile", "run.yaml", *_OVERRIDES, MASTER_PORT="29666")
    arguments = runner.parse_args(found["deepspeed"])
    assert arguments.hostfile == str(SCRIPTS / "hostfile")
    assert arguments.master_port == 29666
    assert arguments.no_ssh == bool(number)
    if number:
        assert (arguments.node_rank, arguments.master_addr) == (1, "node0")
    check_training(arguments, arguments.user_script, arguments.user_args)


def test_torchrun(tmp_path: Path) -> None:
    found = called(tmp_path, "torchrun.sh", 1, 2, 8, "run.yaml", *_OVERRIDES, MASTER_ADDR="node0")
    arguments = torchrun.get_args_parser().parse_args(found["torchrun"])
    assert (arguments.nnodes, arguments.node_rank, arguments.nproc_per_node) == ("2", 1, "8")
    assert (arguments.master_addr, arguments.master_port) == ("node0", 29500)
    check_training(arguments, arguments.training_script, arguments.training_script_args)


@pytest.mark.parametrize("script", ["pdsh.sh", "no_ssh.sh", "ssh.sh", "torchrun.sh"])
def test_arguments_that_are_missing_are_an_error(script: str) -> None:
    done = subprocess.run(["bash", SCRIPTS / script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode != 0
    assert f"usage: {script} " in done.stdout


@pytest.mark.parametrize("text", [None, "# node0 slots=8\n"], ids=["no file", "no host"])
def test_ssh_without_hosts_is_an_error(text: str | None, tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    if text is not None:
        hostfile.write_text(text)
    command = ["bash", SCRIPTS / "ssh.sh", hostfile, "run.yaml"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 2
    assert f"error: no host in {hostfile}" in done.stdout


def test_ssh_takes_no_host_for_an_option_and_notices_one_that_is_gone(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    write = f"import json, sys; open({str(calls)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n'); sys.exit(3)"
    (tmp_path / "ssh").write_text(f"#!{sys.executable}\n{write}\n")
    (tmp_path / "ssh").chmod(0o755)
    hosts = ("-oProxyCommand=reboot", "node1")
    (tmp_path / "hosts").write_text("".join(f"{host} slots=1\n" for host in hosts))
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", SCRIPTS / "ssh.sh", tmp_path / "hosts", "run.yaml"], env=env, timeout=60)
    assert done.returncode == 3
    called = [json.loads(line) for line in calls.read_text().splitlines()]
    trains, ends = ([call for call in called if ("pkill" in call[-1]) is ending] for ending in (False, True))
    for calls_of_each in (trains, ends):
        assert sorted(call[-2] for call in calls_of_each) == sorted(hosts)
        assert all(call[-3] == "--" for call in calls_of_each)
    assert all({"ServerAliveInterval=15", "ServerAliveCountMax=4"} <= set(call) for call in trains)
    assert all("ConnectTimeout=10" in call for call in ends)


def test_slurm_takes_the_first_of_many_nodes(tmp_path: Path) -> None:
    run = {
        "scontrol": "seq --format=node%.0f 0 200000",  # more than a pipe holds
        "srun": 'echo "meet at $MASTER_ADDR"',
        "python": f"echo {tmp_path}",  # the run directory
    }
    for name, line in run.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "summary.json").write_text("{}")
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    env |= {"SLURM_JOB_NODELIST": "node[0-200000]", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", SCRIPTS / "slurm.sbatch", "run.yaml"], env=env, stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (0, "meet at node0\n")


def test_interface_is_named_once_and_what_is_set_stays() -> None:
    shown = ["bash", "-c", f"source {SCRIPTS}/environment.sh; env"]
    env = {"PATH": os.environ["PATH"], "NIC": "ib0", "GLOO_SOCKET_IFNAME": "eth1"}
    lines = subprocess.run(shown, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    assert {"NCCL_SOCKET_IFNAME=ib0", "GLOO_SOCKET_IFNAME=eth1", "MASTER_PORT=29500"} <= set(lines)


def variables() -> set[str]:
    """All that the files here set for torch, NCCL, gloo and DeepSpeed."""
    texts = [path.read_text() for path in (*_SHELL, SCRIPTS / "deepspeed_env", SCRIPTS / "pytorchjob.yaml")]
    return set(re.findall(r"\b(?:TORCH_|NCCL_|GLOO_|DEEPSPEED_)[A-Z_]+", "\n".join(texts)))


def test_variables_exist() -> None:
    sources = [
        Path(deepspeed.__file__).with_name("constants.py"),
        Path(torch.__file__).parent / "nn/parallel/distributed.py",
        Path(torch.__file__).parent / "distributed/launcher/api.py",
    ]
    sources += (Path(torch.__file__).parent / "include/torch/csrc/distributed/c10d").glob("*.hpp")
    known = "\n".join(source.read_text() for source in sources)
    assert len(variables()) == 5
    assert {variable for variable in variables() if variable not in known} == set()


def test_deepspeed_env_is_what_the_launcher_reads() -> None:
    # It splits every line at its first "=", and fails on comments and empty lines.
    lines = (SCRIPTS / "deepspeed_env").read_text().splitlines()
    assert all(re.fullmatch(r"\w+=\S+", line) for line in lines)


def test_hostfile() -> None:
    path = SCRIPTS / "hostfile"
    assert dict(runner.fetch_hostfile(str(path))) == read_hostfile(path) == {"node0": 8, "node1": 8}


def test_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    job = yaml.safe_load((SCRIPTS / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    spec = job["spec"]
    assert isinstance(spec["nprocPerNode"], str), "the operator's schema wants a string"
    replicas = spec["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    assert replicas["Master"]["replicas"] == 1
    for replica in replicas.values():
        assert replica["restartPolicy"] == "OnFailure"
        check_pod(replica["template"]["spec"], int(spec["nprocPerNode"]))

    # What the operator tells the second pod of two.
    told = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": spec["nprocPerNode"]}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    [container] = replicas["Worker"]["template"]["spec"]["containers"]
    assert container["command"] == ["torchrun"]
    expanded = [part.replace("$(MASTER_ADDR)", "m").replace("$(MASTER_PORT)", "23456") for part in container["args"]]
    assert "$" not in "".join(expanded)
    arguments = torchrun.get_args_parser().parse_args(expanded)
    assert (arguments.nnodes, arguments.node_rank, arguments.nproc_per_node) == ("2", 1, "8")
    assert (arguments.master_addr, arguments.master_port) == ("m", 23456)
    assert arguments.training_script == "megatron_tied.pretrain"
    ours = read_arguments(arguments.training_script_args)
    config = container["volumeMounts"][1]
    assert Path(ours.config).parent == Path(config["mountPath"])
    assert ours.overrides == ["train.run_dir=/runs/pretrain"]


def check_pod(pod: dict, ranks: int) -> None:
    [container] = pod["containers"]
    assert container["name"] == "pytorch", "the operator tells this container how to meet the others"
    assert [port["name"] for port in container["ports"]] == ["pytorchjob-port"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == ranks
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume.pop("name"): volume for volume in map(dict, pod["volumes"])}
    assert set(mounted) == set(volumes)
    assert "persistentVolumeClaim" in volumes["runs"]
    assert volumes["memory"]["emptyDir"]["medium"] == "Memory"
    assert mounted["memory"] == "/dev/shm"
    assert all(isinstance(variable["value"], str) for variable in container["env"])
    [patience] = (v["value"] for v in container["env"] if v["name"] == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    assert 60 <= int(patience) < pod["terminationGracePeriodSeconds"]
