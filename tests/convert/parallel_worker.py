"""One rank: loads conversions at several degrees of expert parallelism, computes logits, and trains a step."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

import megatron_tied as mt
from megatron_tied.checkpoint.loader import load_weights, verified
from tests.distributed.training_run import (
    HYPERPARAMETERS,
    Case,
    full_gradients,
    gather,
    micro_batch,
    model_config,
    model_parallel,
    step,
)


def build(directory: Path, backend: str) -> torch.nn.Module:
    """The converted model, whose config its manifest has, in this rank's shard."""
    checkpoint = verified(directory)
    run = checkpoint.manifest.run
    config = mt.ModelConfig.resolve(run["model"] | {"expert_backend": backend})
    model = mt.build_gpt_model(config, mt.TieConfig(**run["tie"]))
    load_weights(model, checkpoint)
    return model


@torch.no_grad()
def logits(directory: Path, ep: int, backend: str, tokens: torch.Tensor) -> torch.Tensor:
    """What this rank computes; all ranks are given the same tokens."""
    with model_parallel(ep):
        model = build(directory, backend).eval()
        inputs = micro_batch(torch.cat([tokens, tokens[:, :1]], dim=1), 0, 1)[:3]
        return model(*inputs).float()


def one_step(job: dict[str, Any], directory: Path, case: Case) -> dict[str, Any]:
    """The losses and gradients of the first step after `init_from`, under ZeRO 1."""
    spec = job["spec"]
    checkpoint = verified(directory)
    with model_parallel(case.ep):
        model = mt.build_gpt_model(model_config(spec, case), mt.TieConfig(**checkpoint.manifest.run["tie"]))
        load_weights(model, checkpoint)
        groups = mt.parameter_groups(model, lr=job["lr"], weight_decay=job["weight_decay"])
        optimizer = torch.optim.AdamW(groups, lr=job["lr"], weight_decay=job["weight_decay"], **HYPERPARAMETERS)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": job["clip_grad"],
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
        }
        engine = mt.initialize(model, config, optimizer=optimizer)[0]
        found: dict[str, Any] = {}

        def keep() -> None:
            found["gradients"] = gather(engine.module, spec, full_gradients(engine.module))

        found["losses"] = step(engine, job["batches"][0], 1, keep)
        engine.destroy()
    return found


def main(job_file: str, result_file: str) -> None:
    """All cases; rank 0 saves what came out."""
    job = torch.load(job_file, weights_only=False)
    found = [logits(Path(directory), ep, backend, job["tokens"]) for directory, ep, backend in job["cases"]]
    steps = [one_step(work, Path(directory), Case(ep=2)) for directory, work in job["steps"]]
    if torch.distributed.get_rank() == 0:
        torch.save({"logits": found, "steps": steps}, result_file)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
