"""One rank of Muon's cases: trains the tiny model at each ZeRO stage, with experts on one rank and on two."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import save_file

import megatron_tied as mt
from megatron_tied.engine import locations
from megatron_tied.engine.muon import MuonAdamW
from megatron_tied.engine.parameter_groups import AdamWGroups
from tests.distributed.training_run import full_weights, gather_whole, model_parallel, step
from tests.tiny_model import TIE, build

LR, ADAMW_LR, DECAY, ADAMW_DECAY, CLIP, STEPS = 0.02, 0.002, 0.1, 0.01, 1.0, 10
ADAMW: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-5}
NO_ROUTER_LOSSES = {"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 0.0}
# Expert parallel size, ZeRO stage, and where it keeps optimizer states.
CASES = [(ep, stage, "none") for ep in (1, 2) for stage in (0, 1, 2, 3)] + [(2, 2, "cpu"), (2, 3, "cpu")]


def batches() -> Iterator[torch.Tensor]:
    """Global batches of four sequences, nine tokens each."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        yield torch.randint(64, (4, 9), generator=generator)


def trained(stage: int, offload: str = "none") -> dict[str, torch.Tensor]:
    """All weights after the last step, experts of all ranks."""
    model = build(TIE, **NO_ROUTER_LOSSES)
    groups = mt.parameter_groups(model, lr=LR, weight_decay=DECAY, beside_muon=AdamWGroups(ADAMW_LR, ADAMW_DECAY))
    optimizer = MuonAdamW(
        groups, lambda groups: torch.optim.AdamW(groups, lr=ADAMW_LR, **ADAMW), lr=LR, precision=torch.float32
    )
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": (accumulation := 2 // torch.distributed.get_world_size()),
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage, "offload_optimizer": {"device": offload}},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    engine = mt.initialize(model, config, optimizer=optimizer)[0]
    for batch in batches():
        step(engine, batch, accumulation)
    weights = gather_whole(engine.module, full_weights(engine.module), projection_norm=False)
    engine.destroy()
    return weights


def main(directory: str) -> None:
    """Writes a file for each case."""
    locations.MOST = 3000  # so that an update is done in several portions
    for ep, stage, offload in CASES:
        with model_parallel(ep):
            weights = trained(stage, offload)
        if torch.distributed.get_rank() == 0:
            save_file(weights, f"{directory}/ep{ep}-zero{stage}-{offload}.safetensors")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
