"""Stages of a save or a load: where one rank fails all of them know, and none waits for a rank that has given up."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch.distributed as dist

from megatron_tied.exchange import AnyJson, gather_json


class RankError(RuntimeError):
    """What went wrong in a stage, in one line: `rank N: reason`, of the first rank that failed."""


def of_every_rank(action: Callable[[], AnyJson], group: dist.ProcessGroup | None = None) -> list[AnyJson]:
    """What `action` returns on each rank of `group` (default: all), told as JSON, in order of rank; a collective.

    Raises `RankError` on every rank if it fails on any.
    """
    results: list[AnyJson] = []
    failure = None
    try:
        results.append(action())
    except Exception as error:
        failure = error
    except BaseException as stop:
        # Ctrl-C goes on its way, but the others must hear of it; they may be gone, too.
        with suppress(Exception):
            gather_json(([], type(stop).__name__), group)
        raise
    told = gather_json((results, None if failure is None else _line(failure)), group)
    try:
        for rank, (_, reason) in enumerate(told):
            if reason is not None:
                raise RankError(f"rank {rank}: {reason}") from failure
    finally:
        # Its traceback has this frame in it: in a circle they would keep alive all that was to be saved.
        del failure
    return [result for (result,), _ in told]


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
