"""Do all hosts see the same run directory and the same cache of indices?"""

from __future__ import annotations

import time
import uuid
from pathlib import Path

from megatron_tied.data.checks import cache_directory, parse_blend
from megatron_tied.doctor.disk import existing
from megatron_tied.doctor.findings import Finding, Level
from megatron_tied.doctor.world import World
from megatron_tied.exchange import gather_json
from megatron_tied.training.config import RunConfig

NAME = "shared"
# A network file system may take a moment to show a new file elsewhere.
_SEEN_WITHIN_SECONDS = 3.0


def check_shared(world: World, config: RunConfig) -> list[Finding]:
    """Make a file on the first host and look for it on the others, for each directory; a collective."""
    run_dir = Path(config.train.run_dir).absolute()
    cache = cache_directory(config.data.cache_dir, parse_blend(config.data.train, "data.train"))
    saves = "every rank writes its part of a checkpoint there" if config.checkpoint.save_every else None
    reads = "the first rank makes the indices of data sets there, and all ranks read them"
    return [
        _check(world, "train.run_dir", run_dir, saves),
        _check(world, "data.cache_dir", cache, reads),
    ]


def _check(world: World, field: str, directory: Path, why: str | None) -> Finding:
    """why: what all hosts need it for; None if only the first one does."""
    where, first = f"{field} = {directory}", world.hosts[0]
    marker, failure = existing(directory) / f".doctor-{uuid.uuid4().hex}", None
    if world.rank == 0:
        try:
            marker.touch(exist_ok=False)
        except OSError as error:
            failure = error.strerror
    try:
        name, failure = gather_json([marker.name, failure])[0]
        if failure is not None:
            remedy = f"set {field} to a directory that can be written"
            return Finding(NAME, Level.ERROR, f"{where} cannot be written: {failure}", (first,), remedy)
        seen = world.on_each_host(lambda: _appears(existing(directory) / name))
    finally:
        if world.rank == 0:
            marker.unlink(missing_ok=True)
    unseen = tuple(host for host, sees in seen.items() if not sees)
    if not unseen:
        return Finding(NAME, Level.OK, f"{where}: " + ("the same on all hosts" if len(seen) > 1 else "can be written"))
    if why is None:
        return Finding(NAME, Level.OK, f"{where}: on {first} only, and no other host needs it")
    what = f"{where} is not the directory that {first} has under that name, and {why}"
    remedy = f"set {field} to a directory in a file system that all hosts share"
    return Finding(NAME, Level.ERROR, what, unseen, remedy)


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + _SEEN_WITHIN_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
