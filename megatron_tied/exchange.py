"""What ranks tell each other as JSON: nothing that arrives over the network is unpickled."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_tied.platform.host import device

# What `json` writes.
Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]
AnyJson = TypeVar("AnyJson", bound=Json)


def gather_json(value: AnyJson, group: dist.ProcessGroup | None = None) -> list[AnyJson]:
    """The value of every rank of `group` (default: all), on every one of them, in order of rank; a collective.

    Tuples arrive as lists. Raises `TypeError` on every rank, naming those whose value is no JSON.
    """
    try:
        written = json.dumps(value).encode()
    except (TypeError, ValueError, RecursionError):
        written = b""  # which no JSON is
    where = device() if dist.get_backend(group) == dist.Backend.NCCL else torch.device("cpu")
    sizes = [int(of_rank) for of_rank in _all_gather(torch.tensor([len(written)], device=where), group)]
    if wrong := [rank for rank, of_rank in enumerate(sizes) if not of_rank]:
        raise TypeError(f"ranks of the group whose value is no JSON: {wrong}")
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=where)
    padded[: len(written)] = torch.frombuffer(bytearray(written), dtype=torch.uint8)
    gathered = zip(_all_gather(padded, group), sizes, strict=True)
    return [json.loads(of_rank[:size].cpu().numpy().tobytes()) for of_rank, size in gathered]


def on_rank_0(
    action: Callable[[], AnyJson], failures: tuple[type[Exception], ...], told: Callable[[str], Exception]
) -> AnyJson:
    """What `action` finds on the first rank, for all: ranks may see a shared file system a moment apart; a collective.

    If one of `failures` is raised there, every rank raises what `told` makes of its message. Without process groups
    this process is the first rank, and the only one.
    """
    found: list[AnyJson] = []
    reason: str | None = None
    is_alone = not dist.is_initialized()
    if is_alone or dist.get_rank() == 0:
        try:
            found.append(action())
        except failures as error:
            reason = str(error)
    if not is_alone:
        found, reason = gather_json((found, reason))[0]
    if reason is not None:
        raise told(reason)
    return found[0]


def _all_gather(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    everywhere = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everywhere, tensor, group=group)
    return everywhere
