"""What the launcher says of a rank is checked before anything believes it."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from megatron_tied.errors import ConfigError
from megatron_tied.training.launcher import check_launcher
from tests.training.runs import ROOT, environment

RANK = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("said", [{}, RANK, RANK | {"LOCAL_SIZE": "", "LOCAL_WORLD_SIZE": "2"}, {"MASTER_PORT": "1"}])
def test_sound(said: dict[str, str]) -> None:
    check_launcher(said)


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ({"RANK": "one"}, "RANK = 'one': must be a whole number of 0 or more"),
        ({"RANK": "-1"}, "RANK = '-1': must be a whole number of 0 or more"),
        ({"RANK": "2"}, "RANK = 2: must be below WORLD_SIZE = 2"),
        ({"LOCAL_RANK": "²"}, "LOCAL_RANK = '²': must be a whole number of 0 or more"),
        ({"RANK": ""}, "RANK = '': must be a whole number of 0 or more"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE = '': must be a whole number of 1 or more"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE = '0': must be a whole number of 1 or more"),
        ({"LOCAL_SIZE": "2.0"}, "LOCAL_SIZE = '2.0': must be a whole number of 1 or more"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT = '65536': must be 1 to 65535"),
    ],
)
def test_garbage(said: dict[str, str], line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check_launcher(RANK | said)
    assert str(raised.value) == line


def test_what_is_missing_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        check_launcher({"RANK": "0"})
    assert [problem.field for problem in raised.value.problems] == [
        "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("own", "more", "is_told"),
    [
        ("127.0.1.1", {}, True),
        ("192.0.2.1 127.0.1.1", {}, True),  # the first is no address of this host: gloo takes the next
        ("127.0.1.1", {"GLOO_SOCKET_IFNAME": "eth0"}, False),
        ("127.0.1.1", {"LOCAL_SIZE": "2"}, False),
        ("10.0.0.1", {}, False),
        ("fd00::1", {}, False),
        (None, {}, True),
    ],
)
def test_a_host_whose_name_means_loopback_to_itself(
    own: str | None, more: dict[str, str], is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look_up(*_: object, **__: object) -> list[tuple[object, ...]]:
        if own is None:
            raise socket.gaierror("no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in own.split()]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    said = RANK | {"LOCAL_SIZE": "1"} | more
    if not is_told:
        check_launcher(said)
        return
    with pytest.raises(ConfigError, match=r"^GLOO_SOCKET_IFNAME = None: must name the network interface"):
        check_launcher(said)


def test_a_rank_tells_it_and_ends() -> None:
    command = [sys.executable, "-m", "megatron_tied.pretrain", "--config", "none.yaml"]
    said = environment(**RANK | {"LOCAL_RANK": "0", "WORLD_SIZE": "many"})
    ended = subprocess.run(command, cwd=ROOT, env=said, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == [
        "error: 1 problem in the input",
        "  WORLD_SIZE = 'many': must be a whole number of 1 or more",
    ]
