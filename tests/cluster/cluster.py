"""Hosts on one machine: own addresses, names, sshd, disks; links that can be cut and slowed, nodes that can be killed.

All of it lives in namespaces that end with the process that made them.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import pytest

from tests.cluster.namespaces import Namespaces
from tests.cluster.switch import Switch
from tests.training.runs import ROOT, Finished

_PROGRAMS = ("ip", "unshare", "sshd", "ssh", "ssh-keygen", "pdsh", "hostname")
_PROBE = ("unshare", "--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--mount-proc", "ip", "link", "add")
_INIT = Path(__file__).with_name("init.py")
_HOME = Path(pwd.getpwuid(0).pw_dir)
_SSH_CONFIG = """\
Host *
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
# What runs.environment() gives processes that a test starts, for those that a launcher starts on other nodes.
_DEEPSPEED_ENV = "DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n"
_SSHD_PATIENCE_SECONDS = 10


def _missing() -> str:
    if os.geteuid() != 0:
        return "not root"
    if absent := [program for program in _PROGRAMS if shutil.which(program) is None]:
        return "not installed: " + ", ".join(absent)
    for kind in (("bridge0", "type", "bridge"), ("veth0", "type", "veth", "peer", "name", "veth1")):
        probe = subprocess.run([*_PROBE, *kind], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if probe.returncode:
            return f"no namespaces or no {kind[2]} devices here: {probe.stdout.strip()}"
    return "" if Path("/dev/net/tun").exists() else "no /dev/net/tun"


_reason = _missing()
needs_cluster = pytest.mark.skipif(bool(_reason), reason=f"no cluster of namespaces: {_reason}")


class Node:
    """One host of a cluster.

    Where the test finds what is the node's own: `local`, on the node `Cluster.local`; `home`, the home directory;
    `hosts`, its /etc/hosts.
    """

    def __init__(self, switch: Switch, number: int, order: dict[str, object], disk: Path):
        self.name, self.address = f"node{number}", address(number)
        self.local, self.home, self.hosts = disk / "local", disk / "home", disk / "hosts"
        self._switch, self._order = switch, order
        self.boot()

    def boot(self) -> None:
        """Start the node; also again after `kill`, its disk as it was."""
        self._inside = Namespaces([sys.executable, "-I", "-S", str(_INIT), json.dumps(self._order)])
        self._switch.connect(self.name, self._inside.pid, self.address)
        self._inside.tell("the network is up")
        deadline = time.monotonic() + _SSHD_PATIENCE_SECONDS
        while ":0016 00000000:0000 0A" not in Path(f"/proc/{self._inside.pid}/net/tcp").read_text():
            assert time.monotonic() < deadline, f"sshd does not start on {self.name}"
            time.sleep(0.01)

    def start(
        self,
        command: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        output: Path | IO[str] | int | None = None,
        cwd: Path = ROOT,
    ) -> subprocess.Popen[str]:
        """Start a command; the process handed back passes signals on, SIGKILL included, and has its exit code."""
        return self._inside.start(command, self._environment(env), output, cwd)

    def run(
        self,
        command: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        timeout: float = 300,
        cwd: Path = ROOT,
    ) -> Finished:
        """Run a command to its end; it is killed after `timeout` seconds, which raises `TimeoutExpired`."""
        return self._inside.run(command, self._environment(env), timeout, cwd)

    def processes(self) -> list[tuple[int, str]]:
        """Process number, as the test sees it, and command line of all that runs on the node but sshd."""
        return self._inside.processes()

    def kill(self) -> None:
        """Power off: every process ends at once, and none says goodbye to other nodes."""
        if self._inside.is_alive:
            self._switch.cut(self.name)
            self._inside.kill()
            self._switch.disconnect(self.name)

    def cut(self) -> None:
        """Lose every packet from and to the node."""
        self._switch.cut(self.name)

    def mend(self) -> None:
        """Join a node that was cut off again."""
        self._switch.join(self.name)

    def slow(self, delay_ms: float) -> None:
        """Delay every packet from and to the node, each way; 0: no longer."""
        self._switch.slow(self.name, delay_ms)

    def _environment(self, env: Mapping[str, str] | None) -> dict[str, str]:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        return {"HOME": str(_HOME), "PATH": path, "DS_ACCELERATOR": "cpu"} | dict(env or {})


class Cluster:
    """`size` nodes, node0 and so on, at 10.77.0.1 and so on, on one switch.

    `directory` and with it `shared` are the same on every node; `local`, /tmp and the home directory are its own.
    """

    def __init__(self, directory: Path, size: int):
        self.directory = directory.resolve()
        self.shared, self.local = self.directory / "shared", self.directory / "local"
        self.nodes: list[Node] = []
        self._size = size

    def __enter__(self) -> Self:
        self.shared.mkdir(parents=True, exist_ok=True)
        self.local.mkdir(exist_ok=True)
        key = self.directory / "key"
        if not key.exists():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        self._switch = Switch()
        try:
            for number in range(self._size):
                self.nodes.append(self._node(number, key))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End everything."""
        for node in self.nodes:
            node.kill()
        self._switch.close()

    def hostfile(self, slots: int) -> Path:
        """A hostfile of all nodes with `slots` ranks each, in the shared directory."""
        path = self.shared / f"hostfile-{slots}"
        path.write_text("".join(f"{node.name} slots={slots}\n" for node in self.nodes))
        return path

    def _node(self, number: int, key: Path) -> Node:
        disk = self.directory / f"node{number}"
        ssh = disk / "home" / ".ssh"
        ssh.mkdir(parents=True, mode=0o700, exist_ok=True)
        hosts = "".join(f"{address(each)} node{each}\n" for each in range(self._size))
        (disk / "hosts").write_text("127.0.0.1 localhost\n" + hosts)
        (ssh / "config").write_text(_SSH_CONFIG)
        shutil.copy(key, ssh / "id_ed25519")
        shutil.copy(key.with_suffix(".pub"), ssh / "authorized_keys")
        (disk / "home" / ".deepspeed_env").write_text(_DEEPSPEED_ENV)
        options = [
            "LogLevel=ERROR",
            "PermitRootLogin=yes",
            "StrictModes=no",
            "UsePAM=no",
            f"ListenAddress={address(number)}",
        ]
        sshd = [shutil.which("sshd"), "-D", "-e", "-f", "/dev/null", "-h", str(key)]
        order = {
            "hostname": f"node{number}",
            "disk": str(disk),
            "own": {str(_HOME): "home", str(self.local): "local", "/tmp": "tmp"},
            "common": sorted({str(self.directory), str(ROOT), sys.prefix, sys.base_prefix}),
            "files": {"/etc/hosts": str(disk / "hosts")},
            "sshd": [*sshd, *(part for option in options for part in ("-o", option))],
        }
        return Node(self._switch, number, order, disk)


def address(number: int) -> str:
    """The address of the node of this number."""
    return f"10.77.0.{number + 1}"
