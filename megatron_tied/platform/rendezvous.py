"""Where the ranks of a run meet: on the address that the launcher names, and on no other."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.platform.host import ranks_on_this_host

_LOOPBACK = "lo"
_REFUSED: dict[int | None, str] = {
    errno.EADDRINUSE: "another program listens there",
    errno.EACCES: "only root may listen there",
}
_listening: WeakValueDictionary[tuple[str, str], torch.distributed.TCPStore] = WeakValueDictionary()


def stay_on_this_host() -> None:
    """Where all ranks are on this host and meet on its loopback address, their collectives (gloo, NCCL) stay there too.

    Interfaces that the environment names are left as they are.
    """
    if _is_one_host() and _is_loopback(os.environ.get("MASTER_ADDR", "")):
        for backend in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{backend}_SOCKET_IFNAME", _LOOPBACK)


def listen_on_master_address() -> torch.distributed.TCPStore | None:
    """The store of the first rank, listening on MASTER_ADDR only; torch's own would listen on every interface.

    torch.distributed takes it for its own while it is alive, and a second call gives it again. None on other ranks,
    under torchrun, whose agent has the store, and where the address is not one of this host's (a service's address in
    Kubernetes) or not one that other hosts reach. Raises `ConfigError` where another program holds the port.
    """
    if os.environ.get("RANK") != "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):
        return None
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not port or is_known_elsewhere(address):
        return None
    if (store := _listening.get((address, port))) is not None:
        return store
    listener = _listener(address, int(port))
    if listener is None:
        return None
    store = torch.distributed.TCPStore(
        address,
        int(port),
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listener.detach(),
    )
    _listening[address, port] = store
    return store


def is_known_elsewhere(name: str) -> bool:
    """Whether `name` is loopback here, and an address that can be reached on the other hosts of this run.

    Debian writes `127.0.1.1 node0` into the hosts file of node0.
    """
    is_loopback_everywhere = name == "localhost" or _is_address(name)
    return not is_loopback_everywhere and _is_loopback(name) and not _is_one_host()


def _listener(address: str, port: int) -> socket.socket | None:
    found = _resolved(address)
    if found is None:
        return None
    try:
        return socket.create_server((found.address, port), family=found.family, backlog=socket.SOMAXCONN)
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            return None
        why = _REFUSED.get(error.errno)
        if why is None:
            raise
        valid = f"must be free on {socket.gethostname()}, and {why}: --master_port NUMBER"
        raise ConfigError(Problem("MASTER_PORT", port, valid)) from None


def _is_one_host() -> bool:
    return ranks_on_this_host() == int(os.environ.get("WORLD_SIZE", 1))


def _is_loopback(name: str) -> bool:
    found = _resolved(name)
    return found is not None and ipaddress.ip_address(found.address).is_loopback


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class _Resolved(NamedTuple):
    family: socket.AddressFamily
    address: str


def _resolved(name: str) -> _Resolved | None:
    """What `name` means on this host; None where it means nothing (yet): torch asks again for a while."""
    try:
        family, *_, found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        return None
    return _Resolved(family, str(found[0]))
