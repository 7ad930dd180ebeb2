"""Ranks come together in a bounded time, or it is told which ones do not, and why."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest

from megatron_tied.doctor.findings import Finding, Level
from megatron_tied.doctor.meeting import (
    Meeting,
    NotMet,
    _listen_for_collectives,
    check_reachability,
    collectives_addresses,
    failed_connections,
    interface_finding,
    judge_ways,
    lacking_interfaces,
)
from megatron_tied.doctor.request import Request, read_line, told_line
from tests.training.runs import ROOT, free_port

HOST = socket.gethostname()
# Of what is refused at once; whoever waited for torch's own timeouts would take longer.
_SOON_SECONDS = 120
# One of two ranks that are hosts by name only: its arguments are that name and the one of its network card.
_HOST = """
import os, socket, sys
socket.gethostname = lambda: sys.argv[1]
os.environ["GLOO_SOCKET_IFNAME"] = sys.argv[2]
from megatron_tied.doctor.meeting import Meeting, NotMet
try:
    with Meeting(100).world():
        print("met")
except NotMet as error:
    for finding in error.findings:
        print(finding.level, finding.hosts, finding.what, finding.remedy, sep="|")
"""


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
    assert 1.0 < time.monotonic() - begin < _SOON_SECONDS
    assert (finding.level, finding.hosts) == (Level.ERROR, (HOST,))
    assert finding.what == f"{HOST} cannot connect to 127.0.0.1:{port} in 2 s: Connection refused"


def test_the_first_rank_may_be_late(port: int) -> None:
    found = threading.Event()

    def listen() -> None:
        time.sleep(1)
        with listening(port):
            found.wait()

    late = threading.Thread(target=listen)
    late.start()
    try:
        assert check_reachability(_SOON_SECONDS) is None
    finally:
        found.set()
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


@pytest.mark.parametrize("address", [("127.0.1.1", 4000), ("::1", 4000), ("10.0.0.9", 0), ("fe80::1%eth0", 0)])
def test_a_name_that_means_no_address_for_others(address: tuple[str, int]) -> None:
    (finding,) = judge_ways({"node0": ("10.0.0.1", 4000), "node1": address}, {"node0": {}, "node1": {}})
    assert finding.hosts == ("node1",)
    assert "GLOO_SOCKET_IFNAME" in finding.remedy


def test_the_interface_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert lacking_interfaces() is None
    assert collectives_addresses() == ["127.0.0.1"]


def test_addresses_of_a_host_that_has_ipv6_only(monkeypatch: pytest.MonkeyPatch) -> None:
    card = [
        SimpleNamespace(family=socket.AF_PACKET, address="02:00:00:00:00:01"),
        SimpleNamespace(family=socket.AF_INET6, address="fd00::5"),
        SimpleNamespace(family=socket.AF_INET6, address="fe80::5%eth5"),
    ]
    monkeypatch.setattr("psutil.net_if_addrs", lambda: {"eth4": card[:1], "eth5": card})
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth5")
    assert lacking_interfaces() is None
    assert collectives_addresses() == ["fd00::5"]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth5,eth4")
    assert lacking_interfaces() == "eth4 (there are eth5)"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    means = [(socket.AF_INET6, kind, 6, "", ("fd00::5", 0, 0, 0)) for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: means)
    assert collectives_addresses() == ["fd00::5"]


@pytest.mark.skipif(not os.path.exists("/proc/net/if_inet6"), reason="no IPv6 here")
def test_an_ipv6_address_is_listened_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_tied.doctor.meeting.collectives_addresses", lambda: ["2001:db8::9", "::1"])
    with ExitStack() as servers:
        address, open_port = _listen_for_collectives(servers)
        assert address == "::1"
        assert failed_connections({"node1": (address, open_port)}) == {}


def test_an_interface_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nic-1")
    finding = not_met(5)
    assert (finding.level, finding.hosts) == (Level.ERROR, (HOST,))
    assert "GLOO_SOCKET_IFNAME" in finding.what
    assert re.search(rf"nic-1 \(there are (.*, )?lo(, .*)?\) on {HOST}$", finding.what)
    assert "`ip -brief address`" in finding.remedy


def test_an_interface_that_one_of_two_hosts_lacks(port: int) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _HOST, f"node{rank}", card],
            env=env | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, card in enumerate(("lo", "nic-1"))
    ]
    try:
        first, second = (rank.communicate(timeout=_SOON_SECONDS)[0] for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
    assert first.startswith("error|('node1',)|GLOO_SOCKET_IFNAME names interfaces that are not there"), first
    assert "nic-1" in first
    assert second == "", "told once"


def test_a_port_where_nobody_says_a_word(port: int) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    with listening(port):
        command = [sys.executable, "-c", _HOST.replace("Meeting(100)", "Meeting(2)"), "node1", "lo"]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, timeout=_SOON_SECONDS)
    assert done.returncode == 0
    assert f"127.0.0.1:{port} answers, but not as a store: it says nothing" in done.stdout


def test_hosts_without_an_interface_are_told_together() -> None:
    finding = interface_finding({"node1": "ib0 (there are eth0, lo)", "node2": "ib0 (there are eth0, lo)"})
    assert finding.what.endswith(": ib0 (there are eth0, lo) on node1, node2")
    assert finding.hosts == ("node1", "node2")


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
    assert time.monotonic() - begin < _SOON_SECONDS


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
