"""The hosts of a run, as the deepspeed launcher reads them: lines such as `node0 slots=8`."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_tied.errors import ConfigError, Problem

# The launcher's own grammar takes any characters, and gives them to ssh and to shells.
_LINE = re.compile(r"(\S+)\s+slots=(\d+)\s*")
_HOST = re.compile(r"(?:[\w.-]+@)?[A-Za-z0-9](?:[\w.:-]*[A-Za-z0-9])?")
_FIELD = "--hostfile"


def read_hostfile(path: Path) -> dict[str, int]:
    """The slots of each host, in order. Raises `ConfigError` with every line that is wrong."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(Problem(_FIELD, str(path), f"cannot be read: {error}")) from None
    hosts: dict[str, int] = {}
    problems = []
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        where = f"{_FIELD} {path}:{number}"
        match = _LINE.fullmatch(line)
        if match is None:
            problems.append(Problem(where, line, "must be HOST slots=NUMBER, such as: node0 slots=8"))
            continue
        host, slots = match[1], int(match[2])
        if not _HOST.fullmatch(host):
            problems.append(Problem(where, host, "must be the name or the address of a host"))
        elif host in hosts:
            problems.append(Problem(where, host, "must be named once only"))
        elif slots < 1:
            problems.append(Problem(where, line, "must have at least one slot"))
        hosts.setdefault(host, slots)
    if not hosts and not problems:
        problems.append(Problem(_FIELD, str(path), "must name at least one host, such as: node0 slots=8"))
    if problems:
        raise ConfigError(problems)
    return hosts
