"""Bringing all ranks together in a bounded time, or saying which host cannot be reached from where."""

from __future__ import annotations

import ipaddress
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import TypeVar

import psutil
import torch
import torch.distributed as dist

from megatron_tied.doctor.findings import Finding, Level, differences, hosts_by_value
from megatron_tied.doctor.world import World
from megatron_tied.errors import ConfigError, listed
from megatron_tied.exchange import Json
from megatron_tied.platform.rendezvous import listen_on_master_address, stay_on_this_host
from megatron_tied.training.launcher import listen_at, own_addresses

PORTS = "ports"
# For a connection between hosts that are both there.
_CONNECT_SECONDS = 5.0
# For one step of the checks; reading all of a data set's files is the longest.
_STEP = timedelta(minutes=20)
# How long the first rank stays after it has told the others that they will not meet.
_LISTEN_SECONDS = 2.0
_MOST_THREADS = 64
_ALL = "all"
_INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME"

Address = tuple[str, int]
_Said = TypeVar("_Said", bound=Json)


class NotMet(Exception):
    """The ranks have not come together; `findings` say why, on the ranks that are to tell."""

    def __init__(self, findings: Sequence[Finding]):
        self.findings = list(findings)
        super().__init__("; ".join(finding.what for finding in findings))


class Meeting:
    """The ranks that the environment names, come together at the launcher's address.

    While it is alive the first rank listens there, also for training that follows: a rank that is early would else
    come to a store that is about to be closed.
    """

    def __init__(self, patience: float):
        """patience: seconds in which all ranks must come. Raises `NotMet` where they do not."""
        self._rank = int(os.environ.get("RANK", 0))
        # Without RANK there is no launcher, and what else is set may be left over.
        self._size = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1
        self._patience = patience
        self._deadline = time.monotonic() + patience
        self._kept = self._meet() if self._size > 1 else dist.HashStore()
        # torchrun keeps its store when it starts all ranks again.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = dist.PrefixStore(f"doctor/{attempt}", self._kept)

    @contextmanager
    def world(self) -> Iterator[World]:
        """torch.distributed among all ranks, over host memory and, where there is CUDA, its devices."""
        hosts = list(self._exchange("host", socket.gethostname, range(self._size)).values())
        self._check_ways(hosts)
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store = dist.PrefixStore("group", self._store)
        dist.init_process_group(backend, store=store, rank=self._rank, world_size=self._size, timeout=_STEP)
        try:
            yield World(self._rank, tuple(hosts))
        finally:
            dist.destroy_process_group()

    def _meet(self) -> dist.Store:
        stay_on_this_host()
        here, tells = (socket.gethostname(),), os.environ.get("LOCAL_RANK", "0") == "0"
        if self._rank == 0:
            try:
                listening = listen_on_master_address()
            except ConfigError as error:
                (problem,) = error.problems
                finding = Finding(PORTS, Level.ERROR, f"{problem.field} {problem.value} {problem.valid}", here)
                raise NotMet([finding]) from None
            if listening is not None:
                return listening
        elif (unreachable := check_reachability(self._left())) is not None:
            raise NotMet([unreachable] if tells else [])
        answer = self._store_there()
        if isinstance(answer, dist.Store):
            return answer
        mute = Finding(PORTS, Level.ERROR, f"{_master()} answers, but not as a store: {answer}", here)
        raise NotMet([mute] if tells else [])

    def _store_there(self) -> dist.Store | str:
        """The store at the launcher's address, or what stands against it.

        In a thread that may be left behind: torch waits for the word of whoever listens there, for ever if need be.
        """
        found: queue.SimpleQueue[dist.Store | str] = queue.SimpleQueue()

        def connect() -> None:
            serves = self._rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
            try:
                store = dist.TCPStore(
                    os.environ["MASTER_ADDR"],
                    int(os.environ["MASTER_PORT"]),
                    is_master=serves,
                    timeout=timedelta(seconds=self._left()),
                    wait_for_workers=False,
                    multi_tenant=True,
                )
            except dist.DistError as error:
                found.put(str(error))
            else:
                found.put(store)

        threading.Thread(target=connect, daemon=True).start()
        try:
            return found.get(timeout=self._left() + _CONNECT_SECONDS)
        except queue.Empty:
            return "it says nothing"

    def _check_ways(self, hosts: Sequence[str]) -> None:
        """Let every host connect to every other one, on ports as collectives take them."""
        firsts = [hosts.index(host) for host in dict.fromkeys(hosts)]
        lacking = self._exchange("interfaces", lacking_interfaces, firsts)
        # gloo would fail on those hosts alone, and leave the others waiting.
        if lacks := {hosts[rank]: reason for rank, reason in lacking.items() if reason is not None}:
            raise NotMet([interface_finding(lacks)] if self._rank == 0 else [])
        if len(firsts) == 1:
            return
        with ExitStack() as servers:
            listening = self._exchange("address", lambda: _listen_for_collectives(servers), firsts)
            addresses = {hosts[rank]: (address, port) for rank, (address, port) in listening.items()}
            others = {host: where for host, where in addresses.items() if host != hosts[self._rank]}
            failures = self._exchange("failures", lambda: failed_connections(others), firsts)
        if findings := judge_ways(addresses, {hosts[rank]: of_host for rank, of_host in failures.items()}):
            raise NotMet(findings if self._rank == 0 else [])

    def _exchange(self, name: str, say: Callable[[], _Said], ranks: Iterable[int]) -> dict[int, _Said]:
        """What each of `ranks` says, in their order, on every rank. Raises `NotMet` if one does not in time."""
        ranks, store = list(ranks), dist.PrefixStore(name, self._store)
        if self._rank in ranks:
            store.set(str(self._rank), json.dumps(say()))
        if self._rank == 0:
            self._collect(name, store, ranks)
        try:
            store.wait([_ALL], timedelta(seconds=self._left() + _LISTEN_SECONDS))
            told = json.loads(store.get(_ALL))
        except dist.DistError:
            raise NotMet([]) from None  # the first rank is gone, and has told why
        if len(told) < len(ranks):
            raise NotMet([])
        self._deadline = time.monotonic() + self._patience
        return dict(zip(ranks, told, strict=True))

    def _collect(self, name: str, store: dist.Store, ranks: Sequence[int]) -> None:
        """On the first rank: wait for what `ranks` say, and publish it, whatever has come in time."""
        awaited = list(ranks)
        while awaited := [rank for rank in awaited if not store.check([str(rank)])]:
            if time.monotonic() > self._deadline:
                break
            time.sleep(0.05)
        told = [json.loads(store.get(str(rank))) for rank in ranks if rank not in awaited]
        store.set(_ALL, json.dumps(told))
        if not awaited:
            return
        what = f"{len(awaited)} of {self._size} ranks have not come to {_master()} in {self._patience:.0f} s: "
        what += listed(awaited)
        if name == "host":
            what += f"; there are those of {listed(list(dict.fromkeys(told)))}"
        remedy = "see what the other hosts say; if nothing, look whether their processes have started"
        time.sleep(_LISTEN_SECONDS)
        raise NotMet([Finding(PORTS, Level.ERROR, what, (), remedy)])

    def _left(self) -> float:
        return max(self._deadline - time.monotonic(), 1.0)


def check_reachability(seconds: float) -> Finding | None:
    """Connect to MASTER_ADDR at MASTER_PORT, again and again for so long; None when it has worked once."""
    master = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline, reason = time.monotonic() + seconds, ""
    while not reason or time.monotonic() < deadline:
        left = max(deadline - time.monotonic(), 0.1)
        failure = _failed_connection(master, min(left, _CONNECT_SECONDS))
        if failure is None:
            return None
        reason = failure
        time.sleep(0.2)
    here = socket.gethostname()
    what = f"{here} cannot connect to {_master()} in {seconds:.0f} s: {reason}"
    remedy = "open the port between the hosts, or take another one: --master_port; is --master_addr right?"
    return Finding(PORTS, Level.ERROR, what, (here,), remedy)


def lacking_interfaces() -> str | None:
    """What interfaces without an address here the environment names for gloo, and which have one; None without any."""
    there = _interfaces()
    lacking = [interface for interface in _named_interfaces() if interface not in there]
    return f"{', '.join(lacking)} (there are {listed(sorted(there))})" if lacking else None


def interface_finding(lacking: Mapping[str, str]) -> Finding:
    """From what `lacking_interfaces` says of hosts."""
    told = differences(hosts_by_value(lacking))
    what = f"{_INTERFACE_VARIABLE} names interfaces that are not there, or have no address: {told}"
    remedy = "see `ip -brief address` there, and name the interface between the hosts (in .deepspeed_env for all hosts)"
    return Finding(PORTS, Level.ERROR, what, tuple(lacking), remedy)


def collectives_addresses() -> list[str]:
    """Where gloo lets other hosts connect to this one, the first that it can listen at: the address of the interface
    that the environment names, or else those that the host's own name means."""
    if named := _named_interfaces():
        return _interfaces()[named[0]][:1]
    return own_addresses()


def _named_interfaces() -> list[str]:
    named = os.environ.get(_INTERFACE_VARIABLE, "")
    # torch takes a single character for nothing.
    return [interface for interface in named.split(",") if interface] if len(named) > 1 else []


def _interfaces() -> dict[str, list[str]]:
    """The interfaces that have addresses, IPv4 before IPv6 as gloo finds them."""
    families = (socket.AF_INET, socket.AF_INET6)
    found = {
        name: [entry.address for family in families for entry in entries if entry.family == family]
        for name, entries in psutil.net_if_addrs().items()
    }
    return {name: addresses for name, addresses in found.items() if addresses}


def _listen_for_collectives(servers: ExitStack) -> Address:
    """Listen at an address and a port as gloo would choose them; port 0 where no address is this host's."""
    addresses = collectives_addresses()
    for address in addresses:
        try:
            listening = listen_at(address, socket.SOMAXCONN)
        except OSError:
            continue
        return address, servers.enter_context(listening).getsockname()[1]
    return addresses[0], 0


def failed_connections(addresses: Mapping[str, Address]) -> dict[str, str]:
    """The hosts, with the reason, whose address and port cannot be connected to from here."""
    if not addresses:
        return {}
    with ThreadPoolExecutor(min(len(addresses), _MOST_THREADS)) as pool:
        tried = pool.map(lambda where: _failed_connection(where, _CONNECT_SECONDS), addresses.values())
        return {host: failure for host, failure in zip(addresses, tried, strict=True) if failure is not None}


def judge_ways(addresses: Mapping[str, Address], failures: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Findings from where each host listens, and whom it cannot connect to."""
    if local := [
        host for host, (address, port) in addresses.items() if ipaddress.ip_address(address).is_loopback or not port
    ]:
        meant = differences(hosts_by_value({host: addresses[host][0] for host in local}))
        what = f"what hosts' own names mean to them is no address at which others reach them: {meant}"
        remedy = "mend /etc/hosts there, or name the interface: GLOO_SOCKET_IFNAME (in .deepspeed_env for all hosts)"
        return [Finding(PORTS, Level.ERROR, what, tuple(local), remedy)]
    remedy = "open ports 1024 to 65535 between the hosts, or name another interface: GLOO_SOCKET_IFNAME"
    findings = []
    for host, unreached in failures.items():
        if unreached:
            why = differences(hosts_by_value({other: f"{reason}:" for other, reason in unreached.items()}))
            what = f"{host} cannot connect to other hosts on the ports that collectives choose ({why})"
            findings.append(Finding(PORTS, Level.ERROR, what, (host,), remedy))
    return findings


def _failed_connection(where: Address, seconds: float) -> str | None:
    try:
        with socket.create_connection(where, timeout=seconds):
            return None
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return error.strerror or str(error)


def _master() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
