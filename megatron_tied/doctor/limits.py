"""What the operating system allows the processes of a run."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Mapping
from pathlib import Path

from megatron_tied.doctor.findings import Finding, Level
from megatron_tied.doctor.world import World

NAME = "limits"
_SHARED_MEMORY = Path("/dev/shm")
_MIB = 1 << 20
# What a container gets unless told otherwise: too little for NCCL beside the workers of data loaders.
_SMALL_SHARED_MEMORY = 64 * _MIB
# Libraries, data and log files; then, for each rank that this one is connected with, a few process groups.
_FILES, _FILES_PER_RANK = 256, 8


def check_limits(world: World) -> list[Finding]:
    """Look at open files and shared memory on every host; a collective."""
    return judge(world.on_each_host(limits_here), len(world.hosts))


def limits_here() -> dict[str, int | None]:
    """The number of files a process may open, and the bytes of shared memory, both None for no limit."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    memory = shutil.disk_usage(_SHARED_MEMORY).total if _SHARED_MEMORY.is_dir() else 0
    return {"files": None if files == resource.RLIM_INFINITY else files, "shared_memory": memory or None}


def judge(limits: Mapping[str, Mapping[str, int | None]], world_size: int) -> list[Finding]:
    """Findings from the limits of each host."""
    findings = []
    needed = _FILES + _FILES_PER_RANK * world_size
    few = {host: of["files"] for host, of in limits.items() if of["files"] is not None and of["files"] < needed}
    if few:
        what = f"a process may open {min(few.values()):,} files, and {world_size} ranks may need {needed:,}"
        findings.append(Finding(NAME, Level.WARNING, what, tuple(few), f"ulimit -n {needed} before the launch"))
    small = {
        host: of["shared_memory"]
        for host, of in limits.items()
        if of["shared_memory"] is not None and of["shared_memory"] <= _SMALL_SHARED_MEMORY
    }
    if small:
        what = f"{_SHARED_MEMORY} holds {min(small.values()) // _MIB} MiB"
        remedy = "start the container with --shm-size=1g, or --ipc=host"
        findings.append(Finding(NAME, Level.WARNING, what, tuple(small), remedy))
    if not findings:
        counts = [of["files"] for of in limits.values() if of["files"] is not None]
        files = f"{min(counts):,}" if counts else "any number of"
        findings.append(Finding(NAME, Level.OK, f"a process may open {files} files"))
    return findings
