"""The network of a cluster: a switch, a cable to every node, and for a slow node a slow cable in between."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.cluster.namespaces import Namespaces

_DELAY_LINK = Path(__file__).with_name("delay_link.py")
_SWITCH = "switch"


class Switch:
    """Joins nodes by Ethernet. What is cut off loses packets silently: the node's own interface stays up."""

    def __init__(self) -> None:
        self._inside = Namespaces(["sh", "-c", "echo ready; cat >/dev/null"])
        self._slow: dict[str, subprocess.Popen[str]] = {}
        self._add_bridge(_SWITCH)

    def connect(self, name: str, pid: int, address: str) -> None:
        """Lay a cable to the network of process `pid`, whose end there gets the address."""
        # A card keeps its number over a restart of its node: others remember it.
        card = "02:00:" + ":".join(f"{int(part):02x}" for part in address.split("."))
        # As seen from here, where process numbers are those of the caller.
        ends = ["link", "add", name, "netns", str(self._inside.pid), "type", "veth", "peer", "name", "eth0"]
        _run("ip", *ends, "address", card, "netns", str(pid))
        _ip(pid, "addr", "add", f"{address}/16", "dev", "eth0")
        _ip(pid, "link", "set", "lo", "up")
        _ip(pid, "link", "set", "eth0", "up")
        self._ip("link", "set", name, "up")
        self.join(name)

    def disconnect(self, name: str) -> None:
        """Take the cable away, whose other end may have gone with its node."""
        _run("nsenter", "--target", str(self._inside.pid), "--net", "ip", "link", "del", name, check=False)

    def cut(self, name: str) -> None:
        """Lose what comes from and goes to this cable."""
        self._ip("link", "set", name, "nomaster")

    def join(self, name: str) -> None:
        """Carry what comes from and goes to this cable."""
        self._ip("link", "set", name, "master", f"{name}-slow" if name in self._slow else _SWITCH)

    def slow(self, name: str, delay_ms: float) -> None:
        """Carry it late by so much, each way; 0: no longer."""
        if name in self._slow:
            self._end_delay(name)
        if delay_ms:
            near, far, bridge = f"{name}-near", f"{name}-far", f"{name}-slow"
            command = [sys.executable, "-I", "-S", str(_DELAY_LINK), near, far, str(delay_ms)]
            relay = self._inside.start(command, output=subprocess.PIPE)
            assert relay.stdout.readline() == "ready\n", relay.communicate()[0]
            self._add_bridge(bridge)
            self._ip("link", "set", near, "master", bridge, "up")
            self._ip("link", "set", far, "master", _SWITCH, "up")
            self._slow[name] = relay
        self.join(name)

    def close(self) -> None:
        """Take it all down."""
        for name in list(self._slow):
            self._end_delay(name)
        self._inside.kill()

    def _end_delay(self, name: str) -> None:
        relay = self._slow.pop(name)
        relay.kill()
        relay.communicate()
        self._ip("link", "del", f"{name}-slow")

    def _add_bridge(self, name: str) -> None:
        self._ip("link", "add", name, "type", "bridge")
        self._ip("link", "set", name, "up")

    def _ip(self, *arguments: str) -> None:
        _ip(self._inside.pid, *arguments)


def _ip(pid: int, *arguments: str) -> None:
    """Change the network of process `pid`."""
    _run("nsenter", "--target", str(pid), "--net", "ip", *arguments)


def _run(*command: str, check: bool = True) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0 or not check, f"{' '.join(command)}: {done.stdout}"
