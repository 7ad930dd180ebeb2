"""What is told of ranks that are lost or have failed."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from megatron_tied.checkpoint.directory import how_to_go_on

_MOST_LETTERS = 1000
_LOOK_SECONDS = 2.0


class Loss(NamedTuple):
    """Why a rank is given up, and the last step it was heard to have done."""

    kind: Literal["closed", "silent", "failed"]
    how: str
    step: int


def causes(losses: Mapping[int, Loss]) -> dict[int, Loss]:
    """What has happened first: of a process that dies, the others' failures are a consequence."""
    for kind in ("closed", "silent"):
        if found := {rank: loss for rank, loss in losses.items() if loss.kind == kind}:
            return dict(sorted(found.items()))
    return dict(list(losses.items())[:1])


def last_line(error: BaseException) -> str:
    """An exception in one line, of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:_MOST_LETTERS]


def tell(
    losses: Mapping[int, Loss], hosts: Sequence[str] | Mapping[int, str], run_dir: Path, *, ends_all: bool
) -> None:
    """Say in one line which rank it was, where, and how it can be gone on from; `ends_all`: whether all ranks end."""
    who = ", ".join(f"rank {rank} on {hosts[rank]} (last step done: {loss.step})" for rank, loss in losses.items())
    first = next(iter(losses.values()))
    what = "failed" if first.kind == "failed" else "lost"
    ends = "Every rank ends here" if ends_all else "The other ranks wait for it (train.liveness_timeout is 0)"
    with contextlib.suppress(OSError):  # on a full disk all ranks are to end, too
        print(f"error: {what}: {who}: {first.how}. {ends}{_way_on(run_dir)}", file=sys.stderr, flush=True)


def _way_on(run_dir: Path) -> str:
    """Looked up in a thread: a file system may be what has failed, and never answer."""
    found: list[str] = []

    def look() -> None:
        with contextlib.suppress(OSError):
            found.append(f"; {run_dir} {how_to_go_on(run_dir)}")

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(_LOOK_SECONDS)
    return "".join(found)
