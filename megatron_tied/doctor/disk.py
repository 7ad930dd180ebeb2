"""Is there room for what a run writes?"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_tied.checkpoint.directory import CheckpointDirectory
from megatron_tied.data.checks import cache_directory, parse_blend
from megatron_tied.doctor.findings import Finding, Level, differences, hosts_by_value
from megatron_tied.doctor.world import World
from megatron_tied.errors import ConfigError
from megatron_tied.planner.hardware import GB, load_hardware
from megatron_tied.run_directory import CHECKPOINTS
from megatron_tied.training.config import RunConfig
from megatron_tied.training.planning import planned_subject

NAME = "disk"
MEND = "mend the mount there, or who may read it"
# In a checkpoint: fp32 weights and AdamW's two states (examples/benchmarks/checkpoints.md).
_BYTES_PER_PARAMETER = 12
# In Megatron-Core's indices, at most: where a sample begins (16), which one comes next (8), and in a blend the data
# set and the number in it (10).
_INDEX_BYTES_PER_SAMPLE = 34


@dataclass(frozen=True)
class Need:
    """Bytes that a run writes into a directory: `least` to begin with, `most` before it ends."""

    field: str
    directory: str
    what: str
    least: int
    most: int


@dataclass(frozen=True)
class _Seen:
    """What a host sees: what the run writes there, and the bytes that are free for each; or why it cannot tell."""

    needs: Sequence[Need] = ()
    free: Sequence[int] = ()
    uncounted: str = ""
    unreadable: str = ""

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> _Seen:
        """What another host has made of it by `asdict`."""
        return cls(**{**told, "needs": [Need(**need) for need in told["needs"]]})


def check_disk(world: World, config: RunConfig) -> list[Finding]:
    """Compare what the run writes with the space that is free for it on every host; a collective."""

    told = world.on_each_host(lambda: asdict(_look(config)))
    seen = {host: _Seen.from_json(of_host) for host, of_host in told.items()}
    if uncounted := {host: of.uncounted for host, of in seen.items() if of.uncounted}:
        what = f"what a checkpoint takes cannot be counted: {next(iter(uncounted.values()))}"
        return [Finding(NAME, Level.WARNING, what, tuple(uncounted))]
    findings = []
    if unreadable := {host: of.unreadable for host, of in seen.items() if of.unreadable}:
        what = f"where the run writes cannot be looked at: {differences(hosts_by_value(unreadable))}"
        findings.append(Finding(NAME, Level.ERROR, what, tuple(unreadable), MEND))
    readable = {host: of for host, of in seen.items() if not of.unreadable}
    for place, need in enumerate(next(iter(readable.values()), _Seen()).needs):
        findings += judge(need, {host: of.free[place] for host, of in readable.items()})
    return findings


def _look(config: RunConfig) -> _Seen:
    try:
        wanted = needs(config)
        return _Seen(wanted, [shutil.disk_usage(existing(Path(need.directory))).free for need in wanted])
    except ConfigError as error:
        return _Seen(uncounted=str(error))
    except OSError as error:
        return _Seen(unreadable=str(error))


def needs(config: RunConfig) -> list[Need]:
    """What the run will write, beside its logs. Raises `ConfigError` if its parameters cannot be counted."""
    cache = cache_directory(config.data.cache_dir, parse_blend(config.data.train, "data.train"))
    samples = config.train.steps * config.train.global_batch_size
    index = Need("data.cache_dir", str(cache), "indices of data sets", 0, samples * _INDEX_BYTES_PER_SAMPLE)
    return [_checkpoints(config), index] if config.checkpoint.save_every else [index]


def judge(need: Need, free: Mapping[str, int]) -> list[Finding]:
    """Findings from the bytes that are free on each host."""
    where = f"{need.field} = {need.directory}"
    for level, enough in ((Level.ERROR, max(need.least, 1)), (Level.WARNING, need.most)):
        if short := [host for host, of_host in free.items() if of_host < enough]:
            left = min(free[host] for host in short)
            what = f"{where}: {_size(left)} free, and {need.what} take {_size(need.most)}"
            if need.least:
                what += f", of which the next one {_size(need.least)}"
            return [Finding(NAME, level, what, tuple(short), f"make room, or set {need.field} to another disk")]
    return [Finding(NAME, Level.OK, f"{where}: {_size(min(free.values()))} free, {_size(need.most)} wanted")]


def existing(directory: Path) -> Path:
    """The directory itself, or the nearest one above it that is seen to be there: in which it will be made."""
    return next(path for path in (directory, *directory.parents) if _is_directory(path))


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # below one that may not be read, or on a mount that is stale
        return False


def _checkpoints(config: RunConfig) -> Need:
    settings, steps = config.checkpoint, config.train.steps
    directory = Path(config.train.run_dir, CHECKPOINTS).absolute()
    parameters = planned_subject(config, load_hardware("cpu")).parameters(config.tie).total
    for_good = steps // settings.keep_every if settings.keep_every else 0
    saves = -(-steps // settings.save_every)
    # While one is written the ones before are still there.
    count = min(settings.keep_last + 1 + for_good, saves)
    there = len(CheckpointDirectory(directory).steps())
    size = parameters * _BYTES_PER_PARAMETER
    return Need("train.run_dir", str(directory), "checkpoints", size, max(1, count - there) * size)


def _size(number: int) -> str:
    return f"{number / GB:,.1f} GB" if number >= GB // 10 else f"{number / 1e6:,.1f} MB"
