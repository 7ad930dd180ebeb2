"""The two-container run: its file, and the commands in it."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from megatron_tied.cli.prepare_data import add_parser
from megatron_tied.pretrain import _parser
from megatron_tied.training.config_file import load_config
from tests.docker.dockerfile import DOCKERFILES, ROOT, Dockerfile

COMPOSE = ROOT / "docker" / "compose.yaml"
NODES = ("node0", "node1")


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    """The services, by name."""
    return yaml.safe_load(COMPOSE.read_text())["services"]


def test_follows_the_schema() -> None:
    check = Path(sys.executable).with_name("check-jsonschema")
    done = subprocess.run(
        [check, "--builtin-schema", "vendor.compose-spec", COMPOSE],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_networks_volumes_and_dependencies_exist(services: dict[str, dict[str, Any]]) -> None:
    whole = yaml.safe_load(COMPOSE.read_text())
    for service in services.values():
        assert set(service.get("networks", ())) <= set(whole["networks"])
        assert {volume.split(":")[0] for volume in service.get("volumes", ())} <= set(whole["volumes"])
        assert set(service.get("depends_on", ())) <= set(services)


def test_every_service_runs_the_cpu_image_without_privileges(services: dict[str, dict[str, Any]]) -> None:
    for service in services.values():
        build = COMPOSE.parent / service["build"]["context"]
        assert (build / service["build"]["dockerfile"]).resolve() == DOCKERFILES[1]
        assert build.resolve() == ROOT
        assert service["cap_drop"] == ["ALL"]
        assert "privileged" not in service
        assert "user" not in service  # the image's own


def test_only_tensorboard_is_reached_and_from_this_host_alone(services: dict[str, dict[str, Any]]) -> None:
    assert [name for name, service in services.items() if "ports" in service] == ["tensorboard"]
    assert services["tensorboard"]["ports"] == ["127.0.0.1:6006:6006"]
    assert yaml.safe_load(COMPOSE.read_text())["networks"]["nodes"]["internal"] is True
    assert all(services[node]["networks"] == ["nodes"] for node in NODES)


def test_the_nodes_are_one_job_of_the_configs_size(
    services: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = []
    for node in NODES:
        [program, *words] = services[node]["command"]
        assert program == "torchrun"
        for name, value in services[node]["environment"].items():
            monkeypatch.setenv(name, value)
        launch = get_args_parser().parse_args(words)
        assert (launch.nnodes, launch.nproc_per_node, launch.module) == ("2", "1", True)
        assert launch.master_addr == NODES[0]
        assert launch.training_script == "megatron_tied.pretrain"
        training = _parser().parse_intermixed_args(launch.training_script_args)
        assert training.config in Dockerfile.read(DOCKERFILES[1]).copied()
        assert load_config(ROOT / training.config, training.overrides).problems(2) == []
        ranks.append(launch.node_rank)
    assert ranks == [0, 1]
    assert services[NODES[0]]["command"] == services[NODES[1]]["command"]


def test_a_stopped_node_has_time_for_a_checkpoint(services: dict[str, dict[str, Any]]) -> None:
    for node in NODES:
        assert services[node]["stop_grace_period"] == "2m"
        assert 60 <= int(services[node]["environment"]["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < 120


def test_the_data_is_what_the_config_trains_on(services: dict[str, dict[str, Any]]) -> None:
    program, command, *words = services["data"]["command"]
    assert (program, command) == ("megatron-tied", "prepare-data")
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    prepared = parser.parse_args([command, *words])
    config = load_config(ROOT / "examples" / "quickstart.yaml", [])
    assert prepared.output == config.data.train
    assert f"{prepared.output}.model" == config.data.tokenizer
    assert prepared.train_tokenizer
    # Debian's bookworm has 3.11.
    assert Dockerfile.read(DOCKERFILES[1]).arguments["DEBIAN_RELEASE"] == "bookworm"
    assert prepared.input == ["/usr/lib/python3.11"]


def test_tensorboard_shows_the_run(services: dict[str, dict[str, Any]]) -> None:
    run_dir = load_config(ROOT / "examples" / "quickstart.yaml", []).train.run_dir
    program, *words = services["tensorboard"]["command"]
    assert shutil.which(program, path=str(Path(sys.executable).parent))
    options = dict(word.removeprefix("--").split("=") for word in words)
    assert options == {"logdir": f"{run_dir}/tensorboard", "host": "0.0.0.0", "port": "6006"}


def test_all_see_one_directory_of_runs(services: dict[str, dict[str, Any]]) -> None:
    workdir = Dockerfile.read(DOCKERFILES[1]).values("WORKDIR")[-1]
    for service in services.values():
        [volume] = service["volumes"]
        assert volume.split(":")[:2] == ["runs", f"{workdir}/runs"]
