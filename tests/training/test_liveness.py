"""A rank that dies, stops or fails ends all ranks, soon, with one message that names it; nothing else does."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from megatron_tied.training.exits import LOST
from megatron_tied.training.heartbeat_thread import CONNECT_SECONDS, HeartbeatThread
from tests.training.liveness_worker import STEP
from tests.training.runs import ROOT, environment, free_port

TIMEOUT = 3.0
BOUND = 20.0  # seconds: of what needs a second
HOST = socket.gethostname()


class Ranks:
    """Three ranks without a launcher that ends the others when one is gone."""

    def __init__(self, case: str, run_dir: Path, count: int = 3):
        self.log, self.count = run_dir / "log", count
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        size = {"WORLD_SIZE": str(count), "LOCAL_SIZE": str(count)}
        command = [sys.executable, "-u", "-m", "tests.training.liveness_worker"]
        with self.log.open("w") as log:
            self.parent = subprocess.Popen(
                [*command, case, str(TIMEOUT), str(run_dir), str(count)],
                cwd=ROOT,
                env=environment(**where, **size),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.pids = self._wait_for(r"^(\d) (\d+)$", range(count), 60)

    def told(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith("error: ")]

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.pids[rank], number)

    def codes(self, *ranks: int, within: float) -> list[int]:
        """The exit codes of these, after at most so many seconds."""
        ended = self._wait_for(r"^ended (\d) (-?\d+)$", ranks, within)
        return [ended[rank] for rank in ranks]

    def are_alive(self) -> bool:
        return "ended" not in self.log.read_text()

    def end(self) -> None:
        for pid in self.pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.parent.wait(10)

    def _wait_for(self, pattern: str, ranks: Iterable[int], seconds: float) -> dict[int, int]:
        deadline = time.monotonic() + seconds
        while True:
            found = {int(rank): int(value) for rank, value in re.findall(pattern, self.log.read_text(), re.MULTILINE)}
            if found.keys() >= set(ranks):
                return found
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)


@pytest.fixture
def ranks(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Ranks]:
    started = Ranks(request.param, tmp_path)
    yield started
    started.end()


@pytest.mark.parametrize("ranks", ["waits", "follows"], indirect=True)
def test_a_rank_dies(ranks: Ranks) -> None:
    ranks.kill(1)
    assert ranks.codes(0, 1, 2, within=BOUND) == [LOST, -signal.SIGKILL, LOST]
    (line,) = ranks.told()
    assert line.startswith(f"error: lost: rank 1 on {HOST} (last step done: {STEP + 1}): its process has died (")
    assert "Traceback" not in ranks.log.read_text()  # of what followed from it


@pytest.mark.parametrize("ranks", ["waits"], indirect=True)
def test_the_first_rank_dies(ranks: Ranks) -> None:
    ranks.kill(0)
    assert ranks.codes(0, 1, 2, within=BOUND) == [-signal.SIGKILL, LOST, LOST]
    (line,) = ranks.told()
    assert line.startswith(f"error: lost: rank 0 on {HOST} (last step done: {STEP}): its process has died (")
    assert line.endswith(" has no checkpoint")


@pytest.mark.parametrize("ranks", ["waits"], indirect=True)
@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_is_stopped(ranks: Ranks, victim: int) -> None:
    others = {0, 1, 2} - {victim}
    ranks.kill(victim, signal.SIGSTOP)
    began = time.monotonic()
    assert ranks.codes(*others, within=TIMEOUT + BOUND) == [LOST, LOST]
    assert time.monotonic() - began >= TIMEOUT - 0.3
    (line,) = ranks.told()
    assert line.startswith(f"error: lost: rank {victim} on {HOST} (last step done: {STEP + victim}): ")
    assert f"nothing was heard of it for {TIMEOUT:g} s" in line
    # When it goes on, it finds itself alone.
    ranks.kill(victim, signal.SIGCONT)
    assert ranks.codes(victim, within=TIMEOUT + BOUND) == [LOST]


@pytest.mark.parametrize("ranks", ["waits"], indirect=True)
def test_a_pause_shorter_than_the_timeout_is_survived(ranks: Ranks) -> None:
    for rank in (0, 2):
        ranks.kill(rank, signal.SIGSTOP)
        time.sleep(0.6 * TIMEOUT)
        ranks.kill(rank, signal.SIGCONT)
    # All at once and long: nobody was silent, they were all away.
    for rank in range(3):
        ranks.kill(rank, signal.SIGSTOP)
    time.sleep(1.5 * TIMEOUT)
    for rank in range(3):
        ranks.kill(rank, signal.SIGCONT)
    time.sleep(1.2 * TIMEOUT)
    assert ranks.are_alive()
    assert not ranks.told()


@pytest.mark.parametrize("ranks", ["fails"], indirect=True)
def test_a_rank_fails(ranks: Ranks) -> None:
    assert ranks.codes(0, 1, 2, within=BOUND) == [LOST, LOST, LOST]
    (line,) = ranks.told()
    assert line.startswith(
        f"error: failed: rank 1 on {HOST} (last step done: {STEP + 1}): ValueError: no more room for the second line. "
    )
    assert ranks.log.read_text().count("Traceback") == 1


@pytest.mark.parametrize("ranks", ["patient"], indirect=True)
def test_while_all_are_patient_silence_counts_late(ranks: Ranks) -> None:
    ranks.kill(0, signal.SIGSTOP)
    time.sleep(2 * TIMEOUT)
    ranks.kill(0, signal.SIGCONT)
    time.sleep(TIMEOUT)
    assert ranks.are_alive()
    ranks.kill(1)  # this is known at once, as ever
    assert ranks.codes(0, 1, 2, within=BOUND) == [LOST, -signal.SIGKILL, LOST]


@pytest.mark.parametrize("ranks", ["ends"], indirect=True)
def test_ranks_that_end_are_not_lost(ranks: Ranks) -> None:
    assert ranks.codes(0, 2, within=BOUND) == [0, 0]
    assert ranks.codes(1, within=3 * TIMEOUT + BOUND) == [0]
    assert not ranks.told()


@pytest.mark.parametrize("ranks", ["waits"], indirect=True)
def test_strangers_are_not_listened_to(ranks: Ranks) -> None:
    listening = subprocess.run(["cat", f"/proc/{ranks.pids[0]}/net/tcp"], capture_output=True, text=True)
    inodes = {
        os.readlink(entry.path).partition("[")[2].rstrip("]")
        for entry in os.scandir(f"/proc/{ranks.pids[0]}/fd")
        if os.readlink(entry.path).startswith("socket:")
    }
    rows = [line.split() for line in listening.stdout.splitlines()[1:]]
    ports = [row for row in rows if row[3] == "0A" and row[9] in inodes]
    draw = random.Random(1)
    assert ports
    for row in ports:
        address, port = row[1].split(":")
        assert address == "0100007F"
        strangers = [b"\n", b'{"secret": "x", "rank": 1}\n', b'{"secret": "\\ud800", "rank": 1}\n', b"[1]\n"]
        for said in (*strangers, draw.randbytes(9000), b""):
            with socket.create_connection(("127.0.0.1", int(port, 16))) as stranger:
                try:
                    stranger.sendall(said)
                    stranger.sendall(json.dumps({"leaves": 1, "end": "0"}).encode() + b"\n")
                except OSError:
                    continue
    time.sleep(1.2 * TIMEOUT)
    assert ranks.are_alive()
    assert not ranks.told()


def test_strangers_beyond_a_number_are_turned_away_at_once(tmp_path: Path) -> None:
    thread = HeartbeatThread(0, ["node0", "node1"], 600.0, tmp_path)
    with contextlib.ExitStack() as opened:
        listener = opened.enter_context(socket.create_server(("127.0.0.1", 0), backlog=128))
        thread.listen_to([1], listener, "secret")
        thread.start()
        address = listener.getsockname()
        waiting = [opened.enter_context(socket.create_connection(address)) for _ in range(60)]
        waiting[-1].settimeout(CONNECT_SECONDS / 2)
        assert waiting[-1].recv(1) == b""
        waiting[0].setblocking(False)
        with pytest.raises(BlockingIOError):
            waiting[0].recv(1)
        thread.leave()
