"""Kills a training job again and again, as crashes and schedulers do: `kill_worker CONFIG DIRECTORY VICTIM KILLS SEED`.

Ranks are forked from this process, which has imported everything: so an instant is tried every few seconds. VICTIM is
"rank" (one of the two dies, and the other is ended as launchers do it) or "job" (both at once). A job that comes to
its end is begun anew in another directory. Prints what it found as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from megatron_tied import pretrain
from megatron_tied.training import run  # noqa: F401  (imported once, before the ranks are forked)

WORLD = 2
_LAUNCHER_PATIENCE_SECONDS = 5.0


class Job:
    """Two ranks of one run."""

    def __init__(self, arguments: list[str], log: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.ranks = [self._fork(rank, port, arguments, log) for rank in range(WORLD)]
        self.codes: dict[int, int] = {}

    def _fork(self, rank: int, port: int, arguments: list[str], log: Path) -> int:
        if child := os.fork():
            return child
        output = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        code = 70
        try:
            code = pretrain.main(arguments)
        finally:
            os._exit(code)

    def has_ended(self) -> bool:
        """True when every rank is gone; notes their exit codes."""
        for rank in self.ranks:
            if rank not in self.codes:
                found, status = os.waitpid(rank, os.WNOHANG)
                if found:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == WORLD

    def kill(self, victims: list[int]) -> None:
        """SIGKILL; ranks that are left are ended like a launcher ends them."""
        self._signal(victims, signal.SIGKILL)
        self._signal([rank for rank in self.ranks if rank not in victims], signal.SIGTERM)
        deadline = time.monotonic() + _LAUNCHER_PATIENCE_SECONDS
        while not self.has_ended() and time.monotonic() < deadline:
            time.sleep(0.02)
        self._signal(self.ranks, signal.SIGKILL)
        while not self.has_ended():
            time.sleep(0.02)

    def _signal(self, ranks: list[int], number: int) -> None:
        for rank in ranks:
            if rank not in self.codes:
                os.kill(rank, number)


def last_step(run_dir: Path) -> int:
    """The last step that the run has logged, which it does before it saves."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    while lines:
        try:
            return json.loads(lines[-1])["step"]
        except ValueError:
            lines.pop()
    return 0


def unfinished(run_dir: Path) -> set[tuple[str, int]]:
    """Checkpoints that are being written or removed, or were when a run was killed."""
    found = set()
    for entry in (run_dir / "checkpoints").glob(".step_*"):
        with contextlib.suppress(FileNotFoundError):
            found.add((entry.name, entry.stat().st_ino))
    return found


def main(config: str, directory: str, victim: str, kills: str, seed: str) -> None:
    """Kill until `kills` instants were tried, then let the last job come to its end."""
    draw = random.Random(int(seed))
    found: list[dict[str, Any]] = []
    ended: list[str] = []
    number, started = 0, time.monotonic()
    while True:
        run_dir = Path(directory, f"{victim}_{number}")
        run_dir.mkdir(exist_ok=True)
        before, remnants = last_step(run_dir), unfinished(run_dir)
        log = run_dir / "log"
        job = Job(["--config", config, f"train.run_dir={run_dir}"], log)
        event = draw.choice(["start", "training", "training", "save", "save"])
        delay = draw.uniform(0, {"start": 2.0, "training": 0.8, "save": 0.01}[event])
        while not job.has_ended() and len(found) < int(kills):
            if (
                event == "start"
                or (event == "training" and last_step(run_dir) != before)
                or unfinished(run_dir) - remnants
            ):
                time.sleep(delay)
                break
            time.sleep(0.001)
        if len(found) == int(kills):
            while not job.has_ended():
                time.sleep(0.05)
        if job.has_ended():
            assert set(job.codes.values()) == {0}, log.read_text()[-4000:]
            ended.append(str(run_dir))
            number += 1
            if len(found) == int(kills):
                break
            continue
        in_save = bool(unfinished(run_dir) - remnants)
        job.kill([draw.choice(job.ranks)] if victim == "rank" else job.ranks)
        steps = sorted(entry.name for entry in (run_dir / "checkpoints").glob("step_*"))
        saved = int(steps[-1].removeprefix("step_")) if steps else 0
        found.append({"step": last_step(run_dir), "saved": saved, "in_save": in_save})
    print(json.dumps({"kills": found, "ended": ended, "seconds": time.monotonic() - started}))


if __name__ == "__main__":
    main(*sys.argv[1:])
