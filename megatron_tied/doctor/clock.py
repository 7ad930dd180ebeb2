"""Do the clocks of the hosts agree?"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median_low

import torch.distributed as dist

from megatron_tied.doctor.findings import Finding, Level
from megatron_tied.doctor.world import World
from megatron_tied.exchange import gather_json

NAME = "clock"
_ROUNDS = 5
_TOLERATED_SECONDS = 1.0


def check_clock(world: World) -> list[Finding]:
    """Compare the time at the same moment, several times; a collective."""
    readings = []
    for _ in range(_ROUNDS):
        dist.barrier()
        readings.append(time.time())
    gathered = gather_json(readings)
    return judge({host: gathered[ranks[0]] for host, ranks in world.ranks_of.items()})


def judge(readings: Mapping[str, Sequence[float]]) -> list[Finding]:
    """Findings from the seconds since 1970 that each host read in each round.

    A host may be late to read, never early: the round in which it is nearest to the others counts.
    """
    rounds = [median_low(at_once) for at_once in zip(*readings.values(), strict=True)]
    offsets = {
        host: min((own - common for own, common in zip(of_host, rounds, strict=True)), key=abs)
        for host, of_host in readings.items()
    }
    skewed = {host: offset for host, offset in offsets.items() if abs(offset) > _TOLERATED_SECONDS}
    if not skewed:
        apart = max(offsets.values()) - min(offsets.values())
        return [Finding(NAME, Level.OK, f"{apart * 1000:.0f} ms apart at most")]
    told = "; ".join(
        f"{host} is {abs(offset):,.1f} s {'ahead of' if offset > 0 else 'behind'} the others"
        for host, offset in skewed.items()
    )
    why = "times of files and of log lines cannot be compared, and what is old is judged by them"
    remedy = "let chrony or ntpd set the clock there"
    return [Finding(NAME, Level.WARNING, f"{told}: {why}", tuple(skewed), remedy)]
