"""Several whole runs in one process per rank, to import torch once: `many_runs CONFIG JSON`, started by torchrun.

The JSON maps a run directory to its overrides.
"""

from __future__ import annotations

import json
import sys

import torch

from megatron_tied import pretrain
from megatron_tied.training import run


def main(config: str, runs: str) -> None:
    """Runs all of them; the first that fails ends this rank with its exit code."""
    from megatron.core import parallel_state  # `run` has prepared the host for it

    # DeepSpeed keeps the group of all processes for the life of a process: it is joined once, and left at the end.
    run.join_processes()
    run.join_processes = lambda: None
    leave = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda group=None: None if group is None else leave(group)
    for directory, overrides in json.loads(runs).items():
        code = pretrain.main(["--config", config, f"train.run_dir={directory}", *overrides])
        if code:
            sys.exit(code)
        parallel_state.destroy_model_parallel()
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
