"""One rank of the watchdog test: compares ranks at every step, then one rank flips one bit of one parameter."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_tied.engine.consistency import find_differences
from tests.distributed.matrix import material, regime_job
from tests.distributed.training_run import Case, build_engine, model_parallel, step


def flip_bit(parameter: torch.nn.Parameter) -> None:
    """Change the lowest bit of one element, the smallest difference there can be."""
    flat = parameter.data.view(-1)
    flat[3:4].view(torch.int32).bitwise_xor_(1)


def watch(stage: int, ep: int, steps: int) -> dict[str, Any]:
    """Differences found at each step of a sound run, and at the step after each planted flip."""
    work = material(regime_job(2))
    with model_parallel(ep):
        engine = build_engine(work["spec"], Case(ep=ep, stage=stage), work["start"], 1e-3, 0.1, 1.0)
        sound = []
        for index in range(steps):
            step(engine, work["batches"][index % len(work["batches"])][:4], 1)
            sound += find_differences(engine.module)
        found = {}
        for name, parameter in engine.module.named_parameters():
            if name in ("decoder.layers.1.mlp.router.weight", "decoder.layers.1.mlp.experts.fc1_weight"):
                if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
                    flip_bit(parameter)
                found[name] = find_differences(engine.module)
                if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
                    flip_bit(parameter)
        engine.destroy()
    return {"sound": sound, "found": found}


def main(result_file: str, steps: str) -> None:
    """Stages 0 to 2, where parameters are replicated; rank 0 writes the findings."""
    results = {stage: watch(stage, ep=2, steps=int(steps)) for stage in (0, 1, 2)}
    if torch.distributed.get_rank() == 0:
        Path(result_file).write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
