"""One rank of the tensor parallel test: trains every variant, tensor and expert parallel over all ranks."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

import megatron_tied as mt
from megatron_tied.engine.consistency import find_differences
from megatron_tied.training.summary import parameter_figures
from tests.distributed.training_run import (
    ROUTING_FIELDS,
    full_weights,
    gather_whole,
    model_parallel,
    routing_engine,
    step,
)

TIE = mt.TieConfig(group_size=3, skip_first=1, skip_last=0)


def train(changes: dict[str, Any], ds: dict[str, Any], batches: torch.Tensor) -> dict[str, Any]:
    """What there is at the start and after a few steps, whole over all ranks."""
    world = int(os.environ["WORLD_SIZE"])
    fields = ROUTING_FIELDS | changes
    projection_norm = fields.get("qk_norm_scope") == "projection"
    with model_parallel(ep=world, tp=world):
        config = mt.ModelConfig.resolve(fields)
        model = mt.build_gpt_model(config, TIE, seed=5)
        figures = parameter_figures(model, config.topology(TIE))
        start = gather_whole(model, full_weights(model), projection_norm=projection_norm)
        engine = routing_engine(model, ds)
        steps = [step(engine, batch, 2) for batch in batches]
        weights = gather_whole(engine.module, full_weights(engine.module), projection_norm=projection_norm)
        biases = {name: value.clone() for name, value in engine.module.named_buffers() if "expert_bias" in name}
        differing = find_differences(engine.module)
        # ZeRO 3 has left an empty Parameter here.
        engine.module.decoder.final_layernorm.weight.data[:1] += torch.distributed.get_rank()
        disturbed = find_differences(engine.module)
        engine.destroy()
    return {
        "start": start,
        "steps": steps,
        "weights": weights,
        "biases": biases,
        "parameters": figures,
        "differing": differing,
        "disturbed": disturbed,
    }


def main(job_file: str, result_file: str) -> None:
    """Train every variant; rank 0 saves what it found."""
    job = torch.load(job_file, weights_only=False)
    results = {name: train(changes, ds, job["batches"]) for name, (changes, ds) in job["variants"].items()}
    if torch.distributed.get_rank() == 0:
        torch.save(results, result_file)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
