"""`megatron-tied supervise` with a launcher, and an ssh, that do as they are told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.training.runs import ROOT, Corpus, config_values, environment

_LAUNCHER = """#!/bin/sh
exec {python} {root}/tests/supervision/stand_in.py {directory} "$@"
"""
# Runs its command here, unless the host is down.
_SSH = """#!/bin/sh
while [ "$1" != -- ]; do shift; done
grep -qx "$2" {directory}/down && exit 255
exec sh -c "$3"
"""


class Supervised:
    """The plan, and what came of it."""

    def __init__(self, directory: Path):
        self.directory = directory
        values = config_values(Corpus(directory / "a", directory / "b", directory / "t"), directory / "run")
        values["checkpoint"] = {"save_every": 10}
        values["train"]["run_dir"] = str(directory / "run")
        self.config = directory / "config.yaml"
        self.config.write_text(json.dumps(values))
        self.down()
        for name, text in {"deepspeed": _LAUNCHER, "ssh": _SSH}.items():
            script = directory / "bin" / name
            script.parent.mkdir(exist_ok=True)
            script.write_text(text.format(python=sys.executable, root=ROOT, directory=directory))
            script.chmod(0o755)
        self.job: subprocess.Popen[str] | None = None

    def down(self, *hosts: str) -> None:
        """These do not answer from now on, all others do."""
        (self.directory / "down").write_text("".join(f"{host}\n" for host in hosts))

    def start(self, *plan: dict[str, Any], options: tuple[str, ...] = (), launcher: tuple[str, ...] = ()) -> None:
        (self.directory / "plan.json").write_text(json.dumps(plan))
        command = [sys.executable, "-m", "megatron_tied.cli.main", "supervise", *options, "--", "deepspeed", *launcher]
        self.job = subprocess.Popen(
            [*command, "--module", "megatron_tied.pretrain", "--config", str(self.config), "train.steps=100"],
            cwd=ROOT,
            env=environment(PATH=f"{self.directory / 'bin'}{os.pathsep}{os.environ['PATH']}"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self) -> tuple[int, list[str]]:
        """Exit code, and what was said."""
        output, _ = self.job.communicate(timeout=60)
        return self.job.returncode, output.splitlines()

    @property
    def starts(self) -> list[dict[str, Any]]:
        log = self.directory / "starts.json"
        return json.loads(log.read_text()) if log.exists() else []

    def await_starts(self, count: int) -> None:
        """Returns when it has been started so often."""
        deadline = time.monotonic() + 60
        while len(self.starts) < count:
            assert time.monotonic() < deadline, "it is not started again"
            time.sleep(0.1)

    def await_line(self, part: str) -> None:
        """Returns when a line with `part` has been said."""
        for line in self.job.stdout:
            if part in line:
                return
        raise AssertionError(f"{part} is never said")

    def await_ranks(self, count: int) -> list[int]:
        """The process numbers of the ranks, once their own children are there."""
        path, deadline = self.directory / "ranks.json", time.monotonic() + 20
        while time.monotonic() < deadline:
            ranks = json.loads(path.read_text() or "[]") if path.exists() else []
            if len(ranks) == count and all(psutil.Process(rank).children() for rank in ranks):
                return ranks
            time.sleep(0.05)
        raise AssertionError("the ranks do not start")

    def left(self) -> list[psutil.Process]:
        """Every process that was started under the token."""
        if not self.starts:
            return []
        token = self.starts[0]["words"][-1]
        found = []
        for process in psutil.process_iter():
            try:
                if token in process.cmdline() or token in process.environ().values():
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Supervised]:
    made = Supervised(tmp_path)
    yield made
    if made.job is not None and made.job.poll() is None:
        made.job.kill()
    for process in made.left():
        process.kill()
