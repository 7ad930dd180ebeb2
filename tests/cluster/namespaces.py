"""Processes with a network, a process table, a file tree and a host name of their own; nothing of it outlives them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from tests.training.runs import ROOT, Finished, environment

_ENTER = Path(__file__).with_name("enter.py")
_UNSHARE = ("unshare", "--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc")


class Namespaces:
    """A first process in namespaces of its own, which ends with this process, and all that is started beside it.

    `init` must end when its standard input does.
    """

    def __init__(self, init: Sequence[str]):
        self._unshare = subprocess.Popen([*_UNSHARE, *init], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.told = self._unshare.stdout.readline().strip()
        if not self.told:
            raise RuntimeError(f"{init} ended with exit code {self._unshare.wait()}")
        self.pid = psutil.Process(self._unshare.pid).children()[0].pid

    @property
    def is_alive(self) -> bool:
        """False once it has been killed."""
        return self._unshare.poll() is None

    def tell(self, line: str) -> None:
        """Write a line to the first process."""
        self._unshare.stdin.write(line + "\n")
        self._unshare.stdin.flush()

    def start(
        self,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        output: Path | IO[str] | int | None = None,
        cwd: Path = ROOT,
    ) -> subprocess.Popen[str]:
        """Start a command; the process handed back passes signals on, SIGKILL included, and has its exit code."""
        opened = output.open("a") if isinstance(output, Path) else output
        entering = [sys.executable, "-I", "-S", str(_ENTER), str(self.pid), str(cwd), *map(str, command)]
        try:
            return subprocess.Popen(
                entering,
                env=environment(**(env or {})),
                stdin=subprocess.DEVNULL,
                stdout=opened,
                stderr=subprocess.STDOUT,
                text=True,
            )
        finally:
            if isinstance(output, Path):
                opened.close()

    def run(
        self,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        timeout: float = 300,
        cwd: Path = ROOT,
    ) -> Finished:
        """Run a command to its end; it is killed after `timeout` seconds, which raises `TimeoutExpired`."""
        job = self.start(command, env, subprocess.PIPE, cwd)
        try:
            output, _ = job.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as late:
            job.kill()
            late.output = job.communicate()[0]
            raise
        return Finished(job.returncode, output)

    def processes(self) -> list[tuple[int, str]]:
        """Number and command line of all that was started in here, by the numbers that this process sees."""
        found = [int(each.name) for each in Path("/proc").iterdir() if each.name.isdecimal()]
        mine = _process_namespace(self.pid)
        inside = [pid for pid in sorted(found) if pid != self.pid and mine and _process_namespace(pid) == mine]
        return [(pid, command) for pid in inside if (command := _command(pid)) is not None]

    def kill(self) -> None:
        """End every process in here at once; returns when they are gone."""
        if self.is_alive:
            # By its number, not through unshare: the kernel lets a first process go only after all others.
            os.kill(self.pid, signal.SIGKILL)
            self._unshare.communicate()


def _process_namespace(pid: int) -> str | None:
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:
        return None


def _command(pid: int) -> str | None:
    """None if it is gone, or is a server of the node's own: sshd and its sessions."""
    try:
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ").strip()
    except OSError:
        return None
    return None if name.startswith("sshd") else arguments or f"[{name}]"
