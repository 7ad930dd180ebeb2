"""One rank of the routing-semantics test: the same model at expert parallel size 1 and 2 must train alike."""

from __future__ import annotations

import sys
from typing import Any

import torch
from megatron.core import parallel_state

import megatron_tied as mt
from megatron_tied.engine.consistency import find_differences
from megatron_tied.engine.groups import is_expert_parallel
from tests.distributed.training_run import ROUTING_FIELDS, full_weights, model_parallel, routing_engine, step

TIE = mt.TieConfig(banks=[0, 1, 1, 1, 2])


def train(changes: dict[str, Any], ep: int, ds: dict[str, Any], batches: torch.Tensor) -> dict:
    """Losses, expert biases and gathered weights of a few steps."""
    with model_parallel(ep):
        model = mt.build_gpt_model(mt.ModelConfig.resolve(ROUTING_FIELDS | changes), TIE, seed=5)
        engine = routing_engine(model, ds)
        figures = [step(engine, batch, 2) for batch in batches]
        weights = _gathered(engine.module, full_weights(engine.module))
        biases = {name: value.clone() for name, value in engine.module.named_buffers() if "expert_bias" in name}
        # Buffers among them: ranks that saw other tokens move them alike.
        assert find_differences(engine.module) == []
        engine.destroy()
    return {"figures": figures, "weights": weights, "biases": biases}


def _gathered(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    group = parallel_state.get_expert_model_parallel_group()
    for name, parameter in model.named_parameters():
        if is_expert_parallel(parameter):
            parts = [torch.empty_like(weights[name]) for _ in range(group.size())]
            torch.distributed.all_gather(parts, weights[name].contiguous(), group=group)
            weights[name] = torch.cat(parts)
    return weights


def main(job_file: str, result_file: str) -> None:
    """Train every variant at EP 1 and 2; rank 0 saves both."""
    job = torch.load(job_file, weights_only=False)
    results = {
        name: [train(changes, ep, ds, job["batches"]) for ep in (1, 2)]
        for name, (changes, ds) in job["variants"].items()
    }
    if torch.distributed.get_rank() == 0:
        torch.save(results, result_file)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
