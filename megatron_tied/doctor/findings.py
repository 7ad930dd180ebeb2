"""What a check finds: how bad it is, on which hosts, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, TypeVar

from megatron_tied.errors import listed

_T = TypeVar("_T")


class Level(StrEnum):
    """An error stops a run now or later, a warning makes it slower or harder to understand."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True)
class Finding:
    """One thing that `check` found; `hosts` are those that it is about (none: all), `remedy` what to do."""

    check: str
    level: Level
    what: str
    hosts: tuple[str, ...] = ()
    remedy: str = ""

    def to_json(self) -> dict[str, object]:
        """As an object of JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Finding:
        """What `to_json` wrote. Raises `KeyError`, `TypeError` or `ValueError` for anything else."""
        return cls(**{**told, "level": Level(told["level"]), "hosts": tuple(told["hosts"])})


def has_errors(findings: Iterable[Finding]) -> bool:
    """Whether a run should not start."""
    return any(finding.level is Level.ERROR for finding in findings)


def hosts_by_value(values: Mapping[str, _T]) -> dict[_T, list[str]]:
    """From what each host says to which hosts say so, in the order of hosts."""
    said: dict[_T, list[str]] = {}
    for host, value in values.items():
        said.setdefault(value, []).append(host)
    return said


def differences(said: Mapping[str, Sequence[str]]) -> str:
    """Who says what, most hosts first: `0.19.8 on node0, node1; 0.19.9 on node2`."""
    by_count = sorted(said.items(), key=lambda item: -len(item[1]))
    return "; ".join(f"{value} on {listed(hosts)}" for value, hosts in by_count)


def minority(said: Mapping[_T, Sequence[str]]) -> tuple[str, ...]:
    """The hosts that say something else than most do; all of them where no majority exists."""
    groups = sorted(said.values(), key=len, reverse=True)
    odd = groups if len(groups) > 1 and len(groups[0]) == len(groups[1]) else groups[1:]
    return tuple(host for group in odd for host in group)
