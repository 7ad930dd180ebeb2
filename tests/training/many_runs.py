"""Several whole runs in one process per rank, to import torch once: `many_runs CONFIG JSON`, started by torchrun.

The JSON maps a run directory to its overrides.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_tied import pretrain
from megatron_tied.training import run
from tests.fp16 import allow_fp16
from tests.process_groups import leave_groups


@contextmanager
def joined_once() -> Iterator[None]:
    """DeepSpeed keeps the group of all processes for the life of a process: it is joined here, and left at the end."""
    allow_fp16()
    run.join_processes()
    run.join_processes = lambda: None
    leave = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda group=None: None if group is None else leave(group)
    yield
    leave()


def train(config: str, directory: str, overrides: list[str]) -> int:
    """One run in this process, whatever has run in it before; returns its exit code."""
    try:
        return pretrain.main(["--config", config, f"train.run_dir={directory}", *overrides])
    finally:
        leave_groups()


def main(config: str, runs: str) -> None:
    """Runs all of them; the first that fails ends this rank with its exit code."""
    with joined_once():
        for directory, overrides in json.loads(runs).items():
            if code := train(config, directory, overrides):
                sys.exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
