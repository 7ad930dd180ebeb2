"""One rank of the gather count: how often does ZeRO 3 gather each parameter in a step?"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from tests.distributed.matrix import Job, material
from tests.distributed.training_run import Case, build_engine, model_parallel, step

# Nothing is kept for its smallness or fetched ahead, so that each count is of one need.
ZERO = {
    "stage": 3,
    "overlap_comm": False,
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
}
_GATHER = "_PartitionedParameterCoordinator__all_gather_params_"
STEPS = 3
# Six layers each: Megatron-Core's tracker of router losses takes models of one depth.
BANKS = {2: (0, 1, 1, 2, 3, 4), 4: (0, 1, 1, 1, 1, 2)}
NO_REUSE = {"stage3_max_reuse_distance": 0}


def counts(recompute: str, group_size: int, **zero: Any) -> dict[str, int]:
    """Gathers of each parameter in the last step, those for recompute included."""
    work = material(Job("olmoe", BANKS[group_size], STEPS))
    found: Counter[str] = Counter()
    names: dict[int, str] = {}
    original = getattr(PartitionedParameterCoordinator, _GATHER)

    def counted(self: Any, params: Any, forward: bool, *rest: Any, **more: Any) -> Any:
        missing = [param for param in params if param.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        found.update(names[id(param)] for param in missing)
        return original(self, params, forward, *rest, **more)

    setattr(PartitionedParameterCoordinator, _GATHER, counted)
    try:
        with model_parallel(2):
            case = Case(ep=2, stage=3, recompute=recompute)
            settings = {**ZERO, **zero}
            engine = build_engine(work["spec"], case, work["start"], 1e-3, 0.1, 1.0, zero_optimization=settings)
            names |= {id(parameter): name for name, parameter in engine.module.named_parameters()}
            for batch in work["batches"]:
                found.clear()
                step(engine, batch, 1)
            engine.destroy()
    finally:
        setattr(PartitionedParameterCoordinator, _GATHER, original)
    return dict(found)


def main(result_file: str) -> None:
    """With our reuse distance and with one too short for any reuse; rank 0 writes the counts."""
    results = {
        f"{recompute} {group_size}": [counts(recompute, group_size), counts(recompute, group_size, **NO_REUSE)]
        for recompute in ("none", "full")
        for group_size in BANKS
    }
    if torch.distributed.get_rank() == 0:
        Path(result_file).write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
