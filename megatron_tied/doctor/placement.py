"""Do expert parallel groups lie inside a host, where all-to-all is fast?"""

from __future__ import annotations

import math

from megatron_tied.doctor.findings import Finding, Level
from megatron_tied.doctor.world import World
from megatron_tied.errors import listed

NAME = "expert groups"


def expert_groups(world_size: int, size: int) -> list[range]:
    """The ranks of each expert parallel group: runs of neighbours, as `initialize_model_parallel` makes them."""
    return [range(first, first + size) for first in range(0, world_size, size)]


def check_placement(world: World, size: int) -> list[Finding]:
    """Where the groups of `size` ranks lie; the same on every rank, and no collective."""
    slots = {host: len(ranks) for host, ranks in world.ranks_of.items()}
    layout = _layout(slots)
    if size == 1:
        return [Finding(NAME, Level.OK, f"no expert parallelism ({layout})")]
    if len(world.hosts) % size:
        return [Finding(NAME, Level.OK, f"groups of {size} ranks: where they lie is known with the hostfile only")]
    groups = expert_groups(len(world.hosts), size)
    parted = [group for group in groups if len({world.hosts[rank] for rank in group}) > 1]
    if not parted:
        where = f"each of the {len(groups)} groups of {size} ranks lies inside a host ({layout})"
        return [Finding(NAME, Level.OK, where)]
    hosts = tuple(host for host in slots if any(host in {world.hosts[rank] for rank in group} for group in parted))
    what = f"{len(parted)} of {len(groups)} groups of {size} ranks span hosts ({layout}): all-to-all takes the network"
    if max(slots.values()) < size:
        fits = math.gcd(size, *slots.values())
        remedy = (
            f"no host has {size} slots; parallel.expert_model_parallel_size={fits} would stay inside one, if it fits "
            "the memory: megatron-tied plan says"
        )
    elif all(ranks == list(range(ranks[0], ranks[-1] + 1)) for ranks in world.ranks_of.values()):
        remedy = f"give each host a multiple of {size} slots in the hostfile"
    else:
        remedy = "number the ranks host by host: the launcher deals them out in turn"
    return [Finding(NAME, Level.WARNING, what, hosts, remedy)]


def _layout(slots: dict[str, int]) -> str:
    if len(set(slots.values())) == 1:
        return f"hosts x slots: {len(slots)} x {next(iter(slots.values()))}"
    return f"slots: {listed([f'{host} {count}' for host, count in slots.items()])}"
