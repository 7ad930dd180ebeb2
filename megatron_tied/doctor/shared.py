"""Do all hosts see the same run directory and the same cache of indices?"""

from __future__ import annotations

import time
import uuid
from contextlib import suppress
from pathlib import Path

from megatron_tied.data.checks import cache_directory, parse_blend
from megatron_tied.doctor.disk import MEND, existing
from megatron_tied.doctor.findings import Finding, Level, differences, hosts_by_value
from megatron_tied.doctor.world import World
from megatron_tied.exchange import gather_json
from megatron_tied.training.config import RunConfig

NAME = "shared"
# A network file system may take a moment to show a new file elsewhere.
_SEEN_WITHIN_SECONDS = 3.0
_SEEN, _ABSENT = "seen", "absent"


def check_shared(world: World, config: RunConfig) -> list[Finding]:
    """Make a file on the first host and look for it on the others, for each directory; a collective."""
    run_dir = Path(config.train.run_dir).absolute()
    cache = cache_directory(config.data.cache_dir, parse_blend(config.data.train, "data.train"))
    saves = "every rank writes its part of a checkpoint there" if config.checkpoint.save_every else None
    reads = "the first rank makes the indices of data sets there, and all ranks read them"
    return [
        *_check(world, "train.run_dir", run_dir, saves),
        *_check(world, "data.cache_dir", cache, reads),
    ]


def _check(world: World, field: str, directory: Path, why: str | None) -> list[Finding]:
    """why: what all hosts need it for; None if only the first one does."""
    where, first = f"{field} = {directory}", world.hosts[0]
    marker, failure = existing(directory) / f".doctor-{uuid.uuid4().hex}", ""
    if world.rank == 0:
        try:
            marker.touch(exist_ok=False)
        except OSError as error:
            failure = _reason(error)
    try:
        name, failure = gather_json([marker.name, failure])[0]
        if failure:
            remedy = f"set {field} to a directory that can be written"
            return [Finding(NAME, Level.ERROR, f"{where} cannot be written: {failure}", (first,), remedy)]
        seen = world.on_each_host(lambda: _appears(existing(directory) / name))
    finally:
        if world.rank == 0 and not failure:
            with suppress(OSError):  # the file system may have gone since
                marker.unlink()
    others = {host: told for host, told in seen.items() if told != _SEEN}
    if not others:
        same = "the same on all hosts" if len(seen) > 1 else "can be written"
        return [Finding(NAME, Level.OK, f"{where}: {same}")]
    if why is None:
        return [Finding(NAME, Level.OK, f"{where}: on {first} only, and no other host needs it")]
    findings = []
    if absent := tuple(host for host, told in others.items() if told == _ABSENT):
        what = f"{where} is not the directory that {first} has under that name, and {why}"
        remedy = f"set {field} to a directory in a file system that all hosts share"
        findings.append(Finding(NAME, Level.ERROR, what, absent, remedy))
    if failures := {host: told for host, told in others.items() if told != _ABSENT}:
        what = f"{where} cannot be looked into, and {why}: {differences(hosts_by_value(failures))}"
        findings.append(Finding(NAME, Level.ERROR, what, tuple(failures), MEND))
    return findings


def _appears(path: Path) -> str:
    """Whether it is there in a while: `_SEEN`, `_ABSENT`, or why that cannot be said."""
    deadline = time.monotonic() + _SEEN_WITHIN_SECONDS
    while True:
        try:
            path.stat()
            return _SEEN
        except (FileNotFoundError, NotADirectoryError):
            told = _ABSENT
        except OSError as error:
            told = _reason(error)
        if time.monotonic() > deadline:
            return told
        time.sleep(0.1)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
