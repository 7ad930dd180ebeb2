"""What the launcher, and the host, say of this rank in the environment."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping

from megatron_tied.errors import ConfigError, Problem

# How `megatron-tied supervise` marks the processes of its run: what a launcher starts, and what that starts.
TOKEN_OPTION = "--supervised"
TOKEN_VARIABLE = "MEGATRON_TIED_SUPERVISED"

_RANKS = ("RANK", "LOCAL_RANK")
_ON_THIS_HOST = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE")  # as deepspeed and torchrun call it
_PORT = "MASTER_PORT"
_HIGHEST_PORT = 65535
# Without one of them DeepSpeed would look for an MPI.
_NEEDED = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", _PORT)


def check_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """Raise `ConfigError` where `environment` cannot be that of a rank; without RANK there need not be a launcher."""
    problems = [
        *_not_numbers(environment, _RANKS, 0),
        *_not_numbers(environment, ("WORLD_SIZE", *filter(environment.get, _ON_THIS_HOST)), 1),
        *_not_numbers(environment, (_PORT,), 1, _HIGHEST_PORT),
    ]
    if "RANK" in environment:
        valid = "must be set where RANK is: the deepspeed launcher and torchrun do it"
        problems += [Problem(name, None, valid) for name in _NEEDED if name not in environment]
        problems = problems or _contradictions(environment)
    if problems:
        raise ConfigError(problems)


def free_port() -> int:
    """A port of this host that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def is_first_here() -> bool:
    """Whether this is the first rank of its host; where the launcher does not say it, every rank counts as one."""
    local_rank = os.environ.get("LOCAL_RANK", "")
    return not local_rank.isdecimal() or int(local_rank) == 0


def _contradictions(environment: Mapping[str, str]) -> list[Problem]:
    rank, ranks = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if rank >= ranks:
        return [Problem("RANK", rank, f"must be below WORLD_SIZE = {ranks}")]
    here = next(filter(None, map(environment.get, _ON_THIS_HOST)), ranks)
    if int(here) >= ranks or environment.get("GLOO_SOCKET_IFNAME"):
        return []
    # gloo listens there, and ranks of other hosts would wait for it in vain.
    address = next(filter(_can_be_listened_at, own_addresses()), None)
    if address is None or not ipaddress.ip_address(address).is_loopback:
        return []
    valid = "must name the network interface between the hosts (see `ip -brief address`): "
    why = f"{socket.gethostname()}'s own name means {address} to it, which no other host reaches"
    return [Problem("GLOO_SOCKET_IFNAME", None, valid + why)]


def own_addresses() -> list[str]:
    """What this host's name means to itself; gloo lets others connect to the first that it can listen at."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return ["127.0.0.1"]  # which gloo takes then
    # A Python without IPv6 would give its addresses as numbers.
    return list(dict.fromkeys(address for *_, (address, *_) in found if isinstance(address, str)))


def listen_at(address: str, backlog: int = 1) -> socket.socket:
    """A server at a port that the system chooses, as gloo opens them. Raises `OSError` where that cannot be."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, 0), family=family, backlog=backlog)


def _can_be_listened_at(address: str) -> bool:
    try:
        listen_at(address).close()
    except OSError:
        return False
    return True


def _not_numbers(
    environment: Mapping[str, str], names: tuple[str, ...], least: int, most: int | None = None
) -> list[Problem]:
    valid = f"must be a whole number of {least} or more" if most is None else f"must be {least} to {most}"
    found = []
    for name in names:
        value = environment.get(name)
        if value is None:
            continue
        is_number = value.isascii() and value.isdigit()
        if not is_number or not least <= int(value) <= (most or int(value)):
            found.append(Problem(name, value, valid))
    return found
