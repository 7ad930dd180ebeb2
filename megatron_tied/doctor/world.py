"""The ranks that are checked, and on which hosts they are; what each host says about itself is gathered from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from megatron_tied.exchange import Json, gather_json

_Seen = TypeVar("_Seen", bound=Json)


@dataclass(frozen=True)
class World:
    """All ranks in order, by the name of their host; this process is `rank`. torch.distributed must be initialised."""

    rank: int
    hosts: tuple[str, ...]

    @property
    def host(self) -> str:
        """Where this process is."""
        return self.hosts[self.rank]

    @cached_property
    def ranks_of(self) -> dict[str, list[int]]:
        """The ranks of each host, hosts in the order of their first rank."""
        ranks: dict[str, list[int]] = {}
        for rank, host in enumerate(self.hosts):
            ranks.setdefault(host, []).append(rank)
        return ranks

    @property
    def speaks_for_host(self) -> bool:
        """Whether this is the first rank of its host."""
        return self.ranks_of[self.host][0] == self.rank

    def on_each_host(self, look: Callable[[], _Seen]) -> dict[str, _Seen]:
        """What the first rank of each host sees, on every rank; a collective."""
        seen = gather_json([look()] if self.speaks_for_host else [])
        return {host: seen[ranks[0]][0] for host, ranks in self.ranks_of.items()}
