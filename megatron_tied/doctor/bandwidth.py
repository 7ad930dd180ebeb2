"""How fast are the collectives that a run lives on, and which host slows them down?"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median

import torch
import torch.distributed as dist

from megatron_tied.doctor.findings import Finding, Level
from megatron_tied.doctor.placement import expert_groups
from megatron_tied.doctor.world import World
from megatron_tied.errors import listed
from megatron_tied.exchange import gather_json
from megatron_tied.planner.hardware import GB
from megatron_tied.platform.host import device

NAME = "bandwidth"
_SIZES = (1 << 10, 1 << 20, 1 << 24)  # bytes of each rank; the first one shows the latency
_SECONDS_PER_SIZE, _MOST_REPEATS = 0.3, 20
# Where this size already takes so long, the next, sixteen times as large, is left out.
_SLOW_SECONDS = 0.2
_LINK_BYTES = 1 << 20
# A host so many times slower than the usual one is worth a look.
_SLOW_HOST = 2.0
_MIB = 1 << 20

Link = tuple[int, int, float]  # two ranks, and bytes per second in each direction


def check_bandwidth(world: World, expert_parallel: int | None) -> list[Finding]:
    """Measure all-to-all, all-reduce and links between neighbours, in less than 10 s; a collective.

    expert_parallel: the size of the groups for all-to-all; None for all ranks.
    """
    ranks = len(world.hosts)
    if ranks == 1:
        return [Finding(NAME, Level.OK, "one rank: nothing to measure")]
    findings = []
    size = expert_parallel or ranks
    if size > 1 and ranks % size == 0:  # else there are no such groups here
        groups = expert_groups(ranks, size)
        made = [dist.new_group(list(group)) for group in groups]
        seconds = _measure(_all_to_all(made[world.rank // size]), made[world.rank // size])
        findings.append(all_to_all_finding(seconds, groups, world.hosts))
    seconds = _measure(dist.all_reduce, None)
    findings.append(all_reduce_finding(seconds, ranks))
    findings.append(slowest_finding(_links(world.rank, ranks), world.hosts))
    return findings


def all_to_all_finding(
    seconds: Mapping[int, Sequence[float]], groups: Sequence[range], hosts: Sequence[str]
) -> Finding:
    """From the seconds of each rank, by bytes per rank: the slowest group, and how fast it is."""
    of_groups = {bytes_: [max(of[rank] for rank in group) for group in groups] for bytes_, of in seconds.items()}
    largest = max(of_groups)
    slowest = groups[max(range(len(groups)), key=of_groups[largest].__getitem__)]
    sent = (len(slowest) - 1) / len(slowest)
    speeds = _speeds({bytes_: max(of) for bytes_, of in of_groups.items()}, sent)
    where = listed(list(dict.fromkeys(hosts[rank] for rank in slowest)))
    which = f"slowest of {len(groups)}: ranks {slowest[0]} to {slowest[-1]} on {where}" if len(groups) > 1 else where
    return Finding(NAME, Level.OK, f"all-to-all in groups of {len(slowest)} ({which}): {speeds}")


def all_reduce_finding(seconds: Mapping[int, Sequence[float]], ranks: int) -> Finding:
    """From the seconds of each rank, by bytes per rank."""
    speeds = _speeds({bytes_: max(of_ranks) for bytes_, of_ranks in seconds.items()}, 2 * (ranks - 1) / ranks)
    return Finding(NAME, Level.OK, f"all-reduce over {ranks} ranks: {speeds}")


def slowest_finding(links: Sequence[Link], hosts: Sequence[str]) -> Finding:
    """Who has no fast link: of hosts, if there are several, else of ranks. A slow host slows both of its neighbours'
    links to it, but each of them has another one."""
    between = [link for link in links if hosts[link[0]] != hosts[link[1]]]
    fastest: dict[str, float] = {}
    for first, second, speed in between or links:
        for rank in (first, second):
            name = hosts[rank] if between else f"rank {rank}"
            fastest[name] = max(fastest.get(name, 0.0), speed)
    lowest, usual = min(fastest.values()), median(fastest.values())
    slowest = [name for name, speed in fastest.items() if speed == lowest]
    told = f"between neighbours in order of rank: {lowest / GB:.3g} GB/s at the slowest, {listed(slowest)}"
    told += f"; the median is {usual / GB:.3g}" if len(fastest) > 2 else ""
    if between and len(fastest) > 2 and lowest * _SLOW_HOST < usual:
        remedy = "look at its cable, at which interface it uses (NCCL_SOCKET_IFNAME), and at what else runs there"
        return Finding(NAME, Level.WARNING, told, tuple(slowest), remedy)
    return Finding(NAME, Level.OK, told)


def _speeds(seconds: Mapping[int, float], share: float) -> str:
    """share: of a rank's bytes, how many pass its link."""
    (smallest, latency), *rest = seconds.items()
    told = [f"{latency * 1e3:.3g} ms for {smallest} bytes"]
    told += [f"{bytes_ * share / time_ / GB:.3g} GB/s at {bytes_ // _MIB} MiB" for bytes_, time_ in rest]
    return ", ".join(told)


def _measure(collective: Callable[[torch.Tensor], object], group: dist.ProcessGroup | None) -> dict[int, list[float]]:
    """Seconds of one call on each rank, by bytes per rank; a collective of all ranks."""
    measured: dict[int, list[float]] = {}
    for size in _SIZES:
        buffer = torch.zeros(_multiple(size, dist.get_world_size(group)), dtype=torch.uint8, device=device())
        call = partial(collective, buffer)
        call()  # makes connections
        # All ranks are to agree on how often they repeat, and on when they stop.
        once = max(gather_json(_seconds(call, 1)))
        repeats = min(max(int(_SECONDS_PER_SIZE / once), 1), _MOST_REPEATS)
        measured[size] = gather_json(_seconds(call, repeats))
        if once > _SLOW_SECONDS:
            break
    return measured


def _all_to_all(group: dist.ProcessGroup) -> Callable[[torch.Tensor], object]:
    return lambda buffer: dist.all_to_all_single(torch.empty_like(buffer), buffer, group=group)


def _links(rank: int, ranks: int) -> list[Link]:
    """The speed between neighbours in order of rank, of the last one and the first, too."""
    neighbours = [(low, low + 1) for low in range(ranks - 1)]
    # In each phase no rank has two partners.
    phases = [neighbours[::2], neighbours[1::2], [(ranks - 1, 0)] if ranks > 2 else []]
    links: list[Link] = []
    for pairs in phases:
        mine = 0.0
        for other in (sum(pair) - rank for pair in pairs if rank in pair):
            swap = partial(_swap, other)
            swap()
            mine = _LINK_BYTES / _seconds(swap, 2)
        speeds = gather_json(mine)
        links += [(first, second, speeds[first]) for first, second in pairs]
    return links


def _swap(other: int) -> None:
    sent, received = (torch.zeros(_LINK_BYTES, dtype=torch.uint8, device=device()) for _ in range(2))
    operations = [dist.P2POp(dist.isend, sent, other), dist.P2POp(dist.irecv, received, other)]
    for pending in dist.batch_isend_irecv(operations):
        pending.wait()


def _seconds(action: Callable[[], object], repeats: int) -> float:
    _finish()
    begin = time.perf_counter()
    for _ in range(repeats):
        action()
    _finish()
    return (time.perf_counter() - begin) / repeats


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _multiple(size: int, ranks: int) -> int:
    return -(-size // ranks) * ranks
