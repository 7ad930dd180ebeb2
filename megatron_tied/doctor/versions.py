"""Is the same software on every host, and one that this package works with?"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch

from megatron_tied.doctor.findings import Finding, Level, differences, hosts_by_value, minority
from megatron_tied.doctor.world import World
from megatron_tied.platform.versions import SUPPORTED, installed_version, version_problems

NAME = "versions"
_DRIVER = Path("/proc/driver/nvidia/version")
_ABSENT = "none"
# Another driver is seldom wrong; another library computes or speaks differently.
_MAY_DIFFER = "driver"


def check_versions(world: World) -> list[Finding]:
    """Compare the versions, and the sources of this package; a collective."""
    problems = world.on_each_host(lambda: list(map(str, version_problems())))
    return [
        *compare(world.on_each_host(versions_here)),
        *(
            Finding(NAME, Level.ERROR, problem, (host,), "install a supported version there")
            for host, of_host in problems.items()
            for problem in of_host
        ),
    ]


def versions_here() -> dict[str, str]:
    """What this host runs; `none` for what it has not."""
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        **{package: _installed(package) for package in SUPPORTED},
        "megatron-tied": f"{_installed('megatron-tied')} (sources {_sources()})",
        "cuda": torch.version.cuda or _ABSENT,
        "driver": _DRIVER.read_text().splitlines()[0] if _DRIVER.exists() else _ABSENT,
    }


def compare(versions: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Findings from the versions of each host."""
    first = next(iter(versions.values()))
    findings = []
    for package in first:
        said = hosts_by_value({host: of_host[package] for host, of_host in versions.items()})
        if len(said) > 1:
            level = Level.WARNING if package == _MAY_DIFFER else Level.ERROR
            most = max(said, key=lambda version: len(said[version]))
            what = f"{package} differs: {differences(said)}"
            findings.append(Finding(NAME, level, what, minority(said), f"make it {most} on every host"))
    if not findings:
        same = ", ".join(f"{package} {version}" for package, version in first.items() if version != _ABSENT)
        findings.append(Finding(NAME, Level.OK, same))
    return findings


def _installed(package: str) -> str:
    try:
        return installed_version(package)
    except metadata.PackageNotFoundError:
        return _ABSENT


def _sources() -> str:
    """A checksum of this package's code: a version stays the same while one works on it."""
    package = Path(__file__).parents[1]
    checksum = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        checksum.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return checksum.hexdigest()[:8]
