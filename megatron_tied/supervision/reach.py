"""Asking the hosts of a run about its processes, over ssh, as the launcher reaches them; in bounded time."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import psutil

from megatron_tied.supervision.sweep import Found, Request, sweep

_CONNECT_SECONDS = 5
_ANSWER_SECONDS = 30
_AT_ONCE = 64


class Reach:
    """The way to every host; `ssh_port` as the launcher was told, None: ssh's own choice."""

    def __init__(self, ssh_port: str | None):
        self._port = [] if ssh_port is None else ["-p", ssh_port]

    def ask(self, hosts: Sequence[str], request: Request) -> dict[str, Found | None]:
        """What each of `hosts` has found; None where it does not answer. Without hosts, this one is asked."""
        if not hosts:
            return {socket.gethostname(): sweep(request)}
        with ThreadPoolExecutor(min(_AT_ONCE, len(hosts))) as threads:
            return dict(zip(hosts, threads.map(lambda host: self._ask_one(host, request), hosts), strict=True))

    def _ask_one(self, host: str, request: Request) -> Found | None:
        if is_this_host(host):
            return sweep(request)
        options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_SECONDS}"]
        # ssh has a shell on the host read one string.
        path = os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))
        there = ["env", f"PYTHONPATH={path}", sys.executable, "-m", "megatron_tied.supervision.sweep"]
        try:
            done = subprocess.run(
                ["ssh", *options, *self._port, "--", host, shlex.join(there)],
                input=json.dumps(request),
                capture_output=True,
                text=True,
                timeout=_ANSWER_SECONDS,
                start_new_session=True,
            )
            # Its own start-up files may have a shell print something first.
            return Found(*json.loads(done.stdout.splitlines()[-1])) if done.returncode == 0 else None
        except (OSError, subprocess.TimeoutExpired, ValueError, TypeError, IndexError):
            return None


def is_this_host(host: str) -> bool:
    """Whether `host` names, or is an address of, the host that this runs on."""
    name = host.rpartition("@")[2]
    if name in ("localhost", socket.gethostname()):
        return True
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(name, None)}
    except OSError:
        return False
    own = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    return bool(found & own)
