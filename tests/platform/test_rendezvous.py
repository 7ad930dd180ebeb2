"""The ranks of a run listen where the launcher says, which is the loopback address on one host."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from megatron_tied.errors import ConfigError
from megatron_tied.platform.rendezvous import listen_on_master_address, stay_on_this_host
from tests.training.runs import free_port

RANK = """
import json, os, psutil, torch
from megatron_tied import platform
platform.prepare()
from megatron_tied.engine.groups import start_distributed

start_distributed()
group = torch.distributed.new_group(backend="gloo")
total = torch.ones(2)
torch.distributed.all_reduce(total, group=group)
listening = [c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
torch.distributed.barrier()
print(json.dumps([total.tolist(), [list(address) for address in listening], os.environ["GLOO_SOCKET_IFNAME"]]))
torch.distributed.destroy_process_group()
"""


def test_one_host_listens_on_loopback_only() -> None:
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.endswith("SOCKET_IFNAME")}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [json.loads(rank.communicate(timeout=120)[0].splitlines()[-1]) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    for total, listening, interface in printed:
        assert (total, interface) == ([2.0, 2.0], "lo")  # where this host's name is not loopback, gloo needs to be told
        assert {address for address, _ in listening} == {"127.0.0.1"}
    assert [port in {number for _, number in listening} for _, listening, _ in printed] == [True, False]


@pytest.fixture
def first_rank(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of the first of two ranks on one host."""
    values = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # noted as absent before, whatever a test sets
        monkeypatch.delenv(name)
    return monkeypatch


def test_a_store_that_clients_reach(first_rank: pytest.MonkeyPatch) -> None:
    store = listen_on_master_address()
    assert store is not None
    store.set("key", "value")
    client = torch.distributed.TCPStore("127.0.0.1", store.port, is_master=False)
    assert client.get("key") == b"value"


def test_a_store_that_is_open_is_used_again(first_rank: pytest.MonkeyPatch) -> None:
    store = listen_on_master_address()
    assert listen_on_master_address() is store
    del store
    assert listen_on_master_address() is not None  # the port was free again


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "1"),
        ("TORCHELASTIC_USE_AGENT_STORE", "True"),
        ("MASTER_ADDR", "192.0.2.1"),  # set aside for documentation: no host has it
    ],
)
def test_nobody_listens_where_it_would_be_wrong(first_rank: pytest.MonkeyPatch, name: str, value: str) -> None:
    first_rank.setenv(name, value)
    assert listen_on_master_address() is None


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost"])
def test_loopback_is_meant_where_it_is_named(first_rank: pytest.MonkeyPatch, address: str) -> None:
    first_rank.setenv("MASTER_ADDR", address)
    first_rank.delenv("LOCAL_SIZE")  # whoever started the ranks has not said that they are all here
    assert listen_on_master_address() is not None


def test_a_name_that_means_loopback_on_its_own_host(first_rank: pytest.MonkeyPatch) -> None:
    first_rank.setenv("MASTER_ADDR", "node0")
    found = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))
    first_rank.setattr(socket, "getaddrinfo", lambda *_, **__: [found])
    first_rank.setenv("LOCAL_SIZE", "1")
    assert listen_on_master_address() is None


def test_a_name_that_means_nothing_yet(first_rank: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    first_rank.setattr(socket, "getaddrinfo", unknown)
    assert listen_on_master_address() is None
    stay_on_this_host()
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_a_port_for_root_is_named(first_rank: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    first_rank.setattr(socket, "create_server", refuse)
    with pytest.raises(ConfigError, match="and only root may listen there"):
        listen_on_master_address()


def test_a_port_in_use_is_named(first_rank: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        first_rank.setenv("MASTER_PORT", str(port))
        with pytest.raises(ConfigError, match=rf"MASTER_PORT = {port}: must be free on {socket.gethostname()}"):
            listen_on_master_address()


def test_interfaces(first_rank: pytest.MonkeyPatch) -> None:
    first_rank.setenv("NCCL_SOCKET_IFNAME", "eth1")
    stay_on_this_host()
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo", "eth1")


@pytest.mark.parametrize(("name", "value"), [("MASTER_ADDR", "192.0.2.1"), ("LOCAL_SIZE", "1")])
def test_interfaces_of_several_hosts_are_not_chosen(first_rank: pytest.MonkeyPatch, name: str, value: str) -> None:
    first_rank.setenv(name, value)
    stay_on_this_host()
    assert "GLOO_SOCKET_IFNAME" not in os.environ
