"""Many cases in one process: the process groups of one are gone before the next."""

from __future__ import annotations

import gc
import sys

import torch


def leave_groups() -> None:
    """Leave all groups but DeepSpeed's: each has three threads that wake up all the time, and a run a dozen groups.

    They go when nothing refers to them, so that DeepSpeed engines must be destroyed before.
    """
    from megatron.core import parallel_state  # the host must be prepared for it

    parallel_state.destroy_model_parallel()
    deepspeed_groups = vars(sys.modules["deepspeed.utils.groups"]) if "deepspeed.utils.groups" in sys.modules else {}
    kept = {torch.distributed.group.WORLD, *filter(_is_group, deepspeed_groups.values())}
    for group in set(torch.distributed.distributed_c10d._world.pg_map) - kept:
        torch.distributed.destroy_process_group(group)
    gc.collect()  # the engine's references


def _is_group(value: object) -> bool:
    return isinstance(value, torch.distributed.ProcessGroup)
