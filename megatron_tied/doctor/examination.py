"""All checks, one after another, on all ranks at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

from megatron_tied.doctor.bandwidth import check_bandwidth
from megatron_tied.doctor.clock import check_clock
from megatron_tied.doctor.data_files import check_data_files
from megatron_tied.doctor.disk import check_disk
from megatron_tied.doctor.findings import Finding, Level, hosts_by_value, minority
from megatron_tied.doctor.limits import check_limits
from megatron_tied.doctor.meeting import PORTS
from megatron_tied.doctor.placement import check_placement
from megatron_tied.doctor.shared import check_shared
from megatron_tied.doctor.versions import check_versions
from megatron_tied.doctor.world import World
from megatron_tied.errors import listed
from megatron_tied.training.config import RunConfig

CONFIG = "config"


def examine(world: World, config: RunConfig | None) -> Iterator[Finding]:
    """What all checks find, the same on every rank; a collective. Without a config, what needs none."""
    ranks, hosts = len(world.hosts), len(world.ranks_of)
    reached = f"{hosts} hosts, each reaches every other one" if hosts > 1 else world.host
    yield Finding(PORTS, Level.OK, f"{ranks} rank{'s' * (ranks > 1)} on {reached}")
    differing = check_config(world, config)
    if differing:
        # What follows is about what the config says: ranks that read different ones would wait for each other.
        yield from differing
        return
    yield from check_versions(world)
    yield from check_clock(world)
    yield from check_limits(world)
    expert_parallel = None
    if config is not None:
        expert_parallel = config.parallel.expert_model_parallel_size
        yield from check_disk(world, config)
        yield from check_shared(world, config)
        yield from check_data_files(world, config)
        yield from check_placement(world, expert_parallel)
    yield from check_bandwidth(world, expert_parallel)


def check_config(world: World, config: RunConfig | None) -> list[Finding]:
    """Whether all hosts have read the same config; a collective. It says nothing if they have."""
    read = json.dumps(config and config.model_dump(mode="json"), sort_keys=True)
    said = hosts_by_value(world.on_each_host(lambda: hashlib.sha256(read.encode()).hexdigest()))
    if len(said) == 1:
        return []
    groups = "; ".join(listed(hosts) for hosts in said.values())
    what = f"the hosts read different configs: {groups}"
    return [Finding(CONFIG, Level.ERROR, what, minority(said), "copy the config file to every host")]
