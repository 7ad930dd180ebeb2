"""One rank of the consistency runs: trains the tiny model case by case and tells what it holds afterwards."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.zero import GatheredParameters
from megatron.core import parallel_state

import megatron_tied as mt
from megatron_tied.engine.groups import is_expert_parallel
from megatron_tied.layers.backends import expert_matrices
from megatron_tied.layers.moe_layer import tied_layers
from megatron_tied.platform.quiet import quiet_deepspeed
from tests.distributed.training_run import model_parallel
from tests.tiny_model import build, inputs, loss

CLIP = 0.5
TIE = mt.TieConfig(banks=[0, 1, 1, 2])


@dataclass(frozen=True)
class Run:
    """One training run.

    starved: a router bias sends every token to the first two experts, so that most ranks get none.
    broken: what of the engine is taken out, to see that the comparison notices: "clip" (by the norm of all experts,
        not only this rank's) or "reduction" (of experts over expert-DP).
    """

    ep: int
    stage: int
    steps: int
    precision: str = "fp32"
    starved: bool = False
    broken: str = ""


STARVED = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}


def start(run: Run) -> mt.TiedMoEEngine:
    """The engine of one run."""
    model = build(TIE, num_layers=4, precision=run.precision, **(STARVED if run.starved else {}))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": run.stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": run.precision == "bf16"},
        "steps_per_print": None,
    }
    groups = mt.parameter_groups(model, lr=1e-3)
    engine = mt.initialize(model, config, optimizer=torch.optim.AdamW(groups, weight_decay=0.0))[0]
    if run.starved:
        for layer in tied_layers(model):
            layer.router.expert_bias[:2] = 100.0
    if run.broken == "reduction":
        engine._reduce_expert_gradients = lambda *arguments: None
    if run.broken == "clip":
        engine.clip_fp32_gradients = lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    return engine


def digest(tensor: torch.Tensor) -> str:
    """A name for the tensor's bits."""
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def digests(model: torch.nn.Module) -> dict[str, str]:
    """The bits of every parameter of this rank, whole over its ZeRO partitions."""
    found = {}
    for name, weight in model.named_parameters():
        with GatheredParameters([weight], enabled=hasattr(weight, "ds_id")):
            found[name] = digest(weight)
    return found


def train(run: Run) -> dict[str, Any]:
    """What this rank saw of the run, each step on other data than its neighbours."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    with model_parallel(run.ep):
        engine = start(run)
        before = digests(engine.module)
        losses, norms = [], []
        for step in range(run.steps):
            value = loss(engine, inputs(seed=step * world + rank))
            engine.backward(value)
            engine.step()
            losses.append(value.item())
            norms.append(float(engine.get_global_grad_norm()))
        result = {
            "before": before,
            "after": digests(engine.module),
            "experts": {name for name, weight in engine.module.named_parameters() if is_expert_parallel(weight)},
            "ep_rank": parallel_state.get_expert_model_parallel_rank(),
            "losses": losses,
            "norms": norms,
        }
        engine.destroy()
    return result


def initial(ep: int, backend: str) -> dict[Any, str]:
    """The bits of this rank's initial weights: experts by owner, global index and matrix, the others by name."""
    with model_parallel(ep):
        model = build(expert_backend=backend)
        found: dict[Any, str] = {
            name: digest(weight) for name, weight in model.named_parameters() if ".mlp.experts." not in name
        }
        for layer in tied_layers(model):
            if layer.is_owner:
                held = zip(layer.local_expert_indices, expert_matrices(layer.experts), strict=True)
                for index, matrices in held:
                    found |= {(layer.layer_index, index, kind): digest(m) for kind, m in matrices.items()}
    return found


def refusal(ep: int) -> str:
    """What `initialize` says to an optimizer that puts all parameters in one group."""
    with model_parallel(ep):
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        try:
            mt.initialize(model, {"train_micro_batch_size_per_gpu": 1}, optimizer=optimizer)
        except mt.ConfigError as error:
            return str(error)
    return ""


def main(job_file: str, result_file: str) -> None:
    """Do the whole job; rank 0 saves what every rank found."""
    job = torch.load(job_file, weights_only=False)
    mt.initialize_model_parallel()
    parallel_state.destroy_model_parallel()
    quiet_deepspeed(rank=1)
    mine = {
        "runs": {run: train(run) for run in job["runs"]},
        "initial": {(ep, backend): initial(ep, backend) for ep, backend in job["initial"]},
        "refusal": refusal(ep=2),
    }
    ranks: list[dict[str, Any]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(ranks, mine)
    if torch.distributed.get_rank() == 0:
        torch.save(ranks, result_file)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
