"""The first process of a node: gives it a name and directories of its own, starts sshd, and lives while stdin is open.

When it ends, however it ends, the kernel ends every other process of the node.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path


def main() -> None:
    order = json.loads(sys.argv[1])
    socket.sethostname(order["hostname"])
    _mount_own(Path(order["disk"]), {Path(path): name for path, name in order["own"].items()}, order["common"])
    for path, source in order["files"].items():
        _mount("--bind", source, path)
    _mount("-t", "tmpfs", "tmpfs", "/dev/shm")
    _mount("-t", "tmpfs", "tmpfs", "/run")
    os.mkdir("/run/sshd")
    print("mounted", flush=True)
    sys.stdin.readline()  # the network is up
    subprocess.Popen(order["sshd"], stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whose parents are gone, the kernel then reaps
    sys.stdin.read()


def _mount_own(disk: Path, own: dict[Path, str], common: list[str]) -> None:
    """Cover each directory of `own` by one of the node's disk; what is `common` to all nodes stays visible there.

    In their order: `disk` may itself be in one of them, which then comes last.
    """
    for path, name in own.items():
        cover = disk / name
        cover.mkdir(parents=True, exist_ok=True)
        for kept in (Path(kept) for kept in common):
            if kept.is_relative_to(path):
                place = cover / kept.relative_to(path)
                place.mkdir(parents=True, exist_ok=True)
                _mount("--rbind", str(kept), str(place))
        _mount("--rbind", str(cover), str(path))


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


if __name__ == "__main__":
    main()
