"""Ranks come together in a bounded time, or it is told which ones do not, and why."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from megatron_tied.doctor.findings import Finding, Level
from megatron_tied.doctor.meeting import (
    Meeting,
    NotMet,
    check_reachability,
    collectives_address,
    failed_connections,
    judge_ways,
)
from megatron_tied.doctor.request import Request, read_line, told_line
from tests.training.runs import free_port

HOST = socket.gethostname()


@contextmanager
def listening(port: int = 0) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", port)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """A port of this host at which the first rank is to be, and is not yet."""
    found = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(found))
    return found


def test_nobody_listens(port: int) -> None:
    begin = time.monotonic()
    finding = check_reachability(1.5)
    assert 1.0 < time.monotonic() - begin < 5
    assert (finding.level, finding.hosts) == (Level.ERROR, (HOST,))
    assert finding.what == f"{HOST} cannot connect to 127.0.0.1:{port} in 2 s: Connection refused"


def test_the_first_rank_may_be_late(port: int) -> None:
    def listen() -> None:
        time.sleep(1)
        with listening(port):
            time.sleep(2)

    late = threading.Thread(target=listen)
    late.start()
    assert check_reachability(10) is None
    late.join()


def test_connections_between_hosts() -> None:
    with listening() as open_port:
        addresses = {"node0": ("127.0.0.1", open_port), "node1": ("127.0.0.1", free_port())}
        assert failed_connections(addresses) == {"node1": "Connection refused"}


def test_what_cannot_connect_is_told() -> None:
    addresses = {f"node{number}": (f"10.0.0.{number}", 4000) for number in range(3)}
    assert judge_ways(addresses, {host: {} for host in addresses}) == []
    (finding,) = judge_ways(
        addresses, {"node0": {}, "node1": {"node0": "no answer", "node2": "no answer"}, "node2": {}}
    )
    assert finding.hosts == ("node1",)
    assert "(no answer: on node0, node2)" in finding.what


@pytest.mark.parametrize("address", [("127.0.1.1", 4000), ("10.0.0.9", 0)])
def test_a_name_that_means_no_address_for_others(address: tuple[str, int]) -> None:
    (finding,) = judge_ways({"node0": ("10.0.0.1", 4000), "node1": address}, {"node0": {}, "node1": {}})
    assert finding.hosts == ("node1",)
    assert "GLOO_SOCKET_IFNAME" in finding.remedy


def test_the_interface_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert collectives_address() == "127.0.0.1"


@pytest.fixture
def first_rank(port: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """The environment of the first of two ranks on this host; the other one is not started. Returns the port."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return port


def not_met(patience: float) -> Finding:
    with pytest.raises(NotMet) as error, Meeting(patience).world():
        pass
    (finding,) = error.value.findings
    return finding


def test_a_rank_that_does_not_come(first_rank: int) -> None:
    begin = time.monotonic()
    told = f"1 of 2 ranks have not come to 127.0.0.1:{first_rank} in 2 s: 1; there are those of {HOST}"
    assert not_met(2).what == told
    assert time.monotonic() - begin < 10


def test_a_port_that_another_program_has(first_rank: int) -> None:
    with listening(first_rank):
        finding = not_met(2)
    told = f"MASTER_PORT {first_rank} must be free on {HOST}, and another program listens there"
    assert finding.what.startswith(told)


def test_what_the_command_and_its_ranks_tell_each_other() -> None:
    request = Request("/a path/$(reboot).yaml", ["data.train=[1, 'a;b']", "größe=\n"], 3.5)
    word = request.encode()
    assert word.replace("-", "").replace("_", "").isalnum()
    assert word.isascii()
    assert Request.decode(word) == request
    finding = Finding("data", Level.ERROR, "größe: {a} differs", ("node0", "node1"), "copy it")
    line = told_line(finding)
    assert line.isascii()
    assert read_line(line) == read_line(f"node1: {line}\n") == finding
    for other in ("", "node1: " + line[:-5], "x" + line, line.replace('"error"', '"worse"'), line.replace("{", "[", 1)):
        assert read_line(other) is None
