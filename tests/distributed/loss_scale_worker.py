"""One rank of the loss scale test: a gradient overflows on the last rank only, and every rank must skip the step."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

import megatron_tied as mt
from megatron_tied.errors import TrainingStopped
from megatron_tied.layers.moe_layer import tied_layers
from megatron_tied.training.guards import loss_scale_floor
from tests.distributed.consistency_worker import digests
from tests.distributed.training_run import model_parallel
from tests.fp16 import allow_fp16
from tests.tiny_model import build, inputs, loss

INITIAL_POWER, FLOOR = 4, 4


def is_last_rank() -> bool:
    """The rank on which things go wrong."""
    return torch.distributed.get_rank() == torch.distributed.get_world_size() - 1


def start(stage: int) -> mt.TiedMoEEngine:
    """fp16 with a loss scale that begins at 2^INITIAL_POWER and may fall to FLOOR."""
    model = build(precision="fp16")
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "fp16": {"enabled": True, "initial_scale_power": INITIAL_POWER, "hysteresis": 1, "min_loss_scale": FLOOR},
        "steps_per_print": None,
    }
    return mt.initialize(model, config, optimizer=torch.optim.AdamW(mt.parameter_groups(model, lr=1e-2)))[0]


def take_step(engine: mt.TiedMoEEngine, *, factor: float = 1.0) -> None:
    """One step; `factor` multiplies the loss of the last rank."""
    value = loss(engine, inputs(seed=torch.distributed.get_rank()))
    engine.backward(value * (factor if is_last_rank() else 1.0))
    engine.step()


def overflow_of_loss(engine: mt.TiedMoEEngine) -> None:
    """A step in which the last rank's loss is infinite."""
    take_step(engine, factor=float("inf"))


def overflow_of_experts(engine: mt.TiedMoEEngine) -> None:
    """A step in which the gradient of one of the last rank's expert weights, which no other rank has, is infinite."""
    weight = next(tied_layers(engine.module)).experts.fc1_weight
    hook = weight.register_hook(lambda gradient: gradient * (float("inf") if is_last_rank() else 1.0))
    take_step(engine)
    hook.remove()


def train(stage: int, overflow: Callable[[mt.TiedMoEEngine], None]) -> dict[str, Any]:
    """A sound step, one that overflows, a sound step."""
    with model_parallel(2):
        engine = start(stage)
        states = [digests(engine.module)]
        scales, applied = [engine.loss_scale_now()], []
        for action in (take_step, overflow, take_step):
            action(engine)
            states.append(digests(engine.module))
            scales.append(engine.loss_scale_now())
            applied.append(engine.was_step_applied())
        engine.destroy()
    return {"states": states, "scales": scales, "applied": applied}


def fall(stage: int) -> str:
    """What is said when the scale can fall no further."""
    with model_parallel(2):
        engine = start(stage)
        for number in range(1, 10):
            try:
                with loss_scale_floor(number):
                    overflow_of_loss(engine)
            except TrainingStopped as error:
                return str(error)
    return "never stopped"


def main(result_file: str) -> None:
    """Stages 1 to 3; rank 0 saves what every rank found."""
    allow_fp16()
    mine = {
        "overflow": {
            (stage, overflow.__name__): train(stage, overflow)
            for stage in (1, 2, 3)
            for overflow in (overflow_of_loss, overflow_of_experts)
        },
        "floor": {stage: fall(stage) for stage in (1, 2, 3)},
    }
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, mine)
    if torch.distributed.get_rank() == 0:
        torch.save(ranks, result_file)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
