"""Bringing all ranks together in a bounded time, or saying which host cannot be reached from where."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

from megatron_tied.doctor.findings import Finding, Level, differences, hosts_by_value, listed
from megatron_tied.doctor.world import World
from megatron_tied.errors import ConfigError
from megatron_tied.exchange import Json
from megatron_tied.platform.rendezvous import listen_on_master_address, stay_on_this_host

PORTS = "ports"
# For a connection between hosts that are both there.
_CONNECT_SECONDS = 5.0
# For one step of the checks; reading all of a data set's files is the longest.
_STEP = timedelta(minutes=20)
# How long the first rank stays after it has told the others that they will not meet.
_LISTEN_SECONDS = 2.0
_MOST_THREADS = 64
_ALL = "all"

Address = tuple[str, int]


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
        self._rank, self._size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self._patience = patience
        self._deadline = time.monotonic() + patience
        self._kept = self._meet() if self._size > 1 else dist.HashStore()
        # torchrun keeps its store when it starts all ranks again.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = dist.PrefixStore(f"doctor/{attempt}", self._kept)

    @contextmanager
    def world(self) -> Iterator[World]:
        """torch.distributed among all ranks, over host memory and, where there is CUDA, its devices."""
        hosts = list(self._exchange("host", socket.gethostname(), range(self._size)).values())
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
        elif (finding := check_reachability(self._left())) is not None:
            raise NotMet([finding] if tells else [])
        serves = self._rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
        try:
            return dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=serves,
                timeout=timedelta(seconds=self._left()),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except dist.DistError as error:
            finding = Finding(PORTS, Level.ERROR, f"{_master()} answers, but not as a store: {error}", here)
            raise NotMet([finding] if tells else []) from None

    def _check_ways(self, hosts: Sequence[str]) -> None:
        """Let every host connect to every other one, on ports as collectives take them."""
        firsts = {host: hosts.index(host) for host in dict.fromkeys(hosts)}
        if len(firsts) == 1:
            return
        speaks = firsts[hosts[self._rank]] == self._rank
        with ExitStack() as servers:
            address = _listen_for_collectives(servers) if speaks else None
            addresses = dict(zip(firsts, self._exchange("address", address, firsts.values()).values(), strict=True))
            others = {host: where for host, where in addresses.items() if host != hosts[self._rank]}
            failures = failed_connections(others) if speaks else None
            told = self._exchange("failures", failures, firsts.values()).values()
        findings = judge_ways(addresses, dict(zip(firsts, told, strict=True)))
        if findings:
            raise NotMet(findings if self._rank == 0 else [])

    def _exchange(self, name: str, value: Json, ranks: Iterable[int]) -> dict[int, Json]:
        """What each of `ranks` says, in their order, on every rank. Raises `NotMet` if one does not in time."""
        ranks, store = list(ranks), dist.PrefixStore(name, self._store)
        if self._rank in ranks:
            store.set(str(self._rank), json.dumps(value))
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
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline, reason = time.monotonic() + seconds, ""
    while not reason or time.monotonic() < deadline:
        left = max(deadline - time.monotonic(), 0.1)
        failure = _failed_connection(address, port, min(left, _CONNECT_SECONDS))
        if failure is None:
            return None
        reason = failure
        time.sleep(0.2)
    here = socket.gethostname()
    what = f"{here} cannot connect to {_master()} in {seconds:.0f} s: {reason}"
    remedy = "open the port between the hosts, or take another one: --master_port; is --master_addr right?"
    return Finding(PORTS, Level.ERROR, what, (here,), remedy)


def collectives_address() -> str:
    """The address at which gloo lets other hosts connect to this one: of the interface that the environment names, or
    else what the host's name means."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    found = [entry.address for entry in psutil.net_if_addrs().get(interface, []) if entry.family == socket.AF_INET]
    if found:
        return found[0]
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


def _listen_for_collectives(servers: ExitStack) -> Address:
    """Listen at an address and a port as gloo would choose them; port 0 where the address is not this host's."""
    address = collectives_address()
    try:
        server = servers.enter_context(socket.create_server((address, 0), backlog=socket.SOMAXCONN))
    except OSError:
        return address, 0
    return address, server.getsockname()[1]


def failed_connections(addresses: Mapping[str, Address]) -> dict[str, str]:
    """The hosts, with the reason, whose address and port cannot be connected to from here."""
    if not addresses:
        return {}
    with ThreadPoolExecutor(min(len(addresses), _MOST_THREADS)) as pool:
        tried = pool.map(lambda where: _failed_connection(*where, _CONNECT_SECONDS), addresses.values())
        return {host: failure for host, failure in zip(addresses, tried, strict=True) if failure is not None}


def judge_ways(addresses: Mapping[str, Address], failures: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Findings from where each host listens, and whom it cannot connect to."""
    if local := [host for host, (address, port) in addresses.items() if address.startswith("127.") or not port]:
        meant = differences(hosts_by_value({host: f"{addresses[host][0]}" for host in local}))
        what = f"what hosts' own names mean to them is no address at which others reach them: {meant}"
        remedy = "mend /etc/hosts there, or name the interface: GLOO_SOCKET_IFNAME (in .deepspeed_env for all hosts)"
        return [Finding(PORTS, Level.ERROR, what, tuple(local), remedy)]
    findings = []
    for host, unreached in failures.items():
        if unreached:
            why = differences(hosts_by_value({other: f"{reason}:" for other, reason in unreached.items()}))
            what = f"{host} cannot connect to other hosts on the ports that collectives choose ({why})"
            remedy = "open ports 1024 to 65535 between the hosts, or name another interface: GLOO_SOCKET_IFNAME"
            findings.append(Finding(PORTS, Level.ERROR, what, (host,), remedy))
    return findings


def _failed_connection(address: str, port: int, seconds: float) -> str | None:
    try:
        with socket.create_connection((address, port), timeout=seconds):
            return None
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return error.strerror or str(error)


def _master() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
