"""One rank that saves a distributed checkpoint half way through a run and goes on from it in other layouts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state

from tests.megatron_lm.cases import NativeCase
from tests.megatron_lm.ranks.native_run import NativeModel, initialize
from tests.process_groups import leave_groups


def start(job: dict[str, Any], case: NativeCase) -> NativeModel:
    """The model of one layout, holding the job's initial weights."""
    leave_groups()
    initialize(
        pipeline_model_parallel_size=case.pp,
        virtual_pipeline_model_parallel_size=case.vp,
        expert_model_parallel_size=case.ep,
    )
    return NativeModel(job["spec"], case, job)


def sharded_state(model: NativeModel, *, is_loading: bool) -> dict[str, Any]:
    """What Megatron-LM saves of model and optimizer (`generate_state_dict`), to be loaded in any layout."""
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    names = ["model"] if len(model.chunks) == 1 else [f"model{index}" for index in range(len(model.chunks))]
    state = {
        name: chunk.module.sharded_state_dict(metadata=metadata)
        for name, chunk in zip(names, model.chunks, strict=True)
    }
    state["optimizer"] = model.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    return state


def load(model: NativeModel, directory: str) -> None:
    """Take model and optimizer from a checkpoint, as Megatron-LM does."""
    state = dist_checkpointing.load(sharded_state(model, is_loading=True), directory)
    if len(model.chunks) == 1:
        model.chunks[0].module.load_state_dict(state["model"], strict=True)
    else:
        for index, chunk in enumerate(model.chunks):
            chunk.module.load_state_dict(state[f"model{index}"], strict=True)
    model.optimizer.load_state_dict(state["optimizer"])


def go_on(model: NativeModel, batches: torch.Tensor) -> dict[str, Any]:
    """Train on `batches`; the steps' figures and the last gradients and weights."""
    recorded: list[Any] = []
    steps = [model.step(batch, lambda: recorded.append(model.gradients())) for batch in batches]
    return {"steps": steps, "gradients": recorded[-1], "weights": model.weights()}


def run(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The uninterrupted run first, then every case of the job from its checkpoint."""
    half = len(job["batches"]) // 2
    directory = job["directory"]
    model = start(job, job["saver"])
    go_on(model, job["batches"][:half])
    if torch.distributed.get_rank() == 0:
        Path(directory).mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(sharded_state(model, is_loading=False), directory)
    traces = [go_on(model, job["batches"][half:])]
    other = {name: torch.zeros_like(value) for name, value in job["start"].items()}
    for case in job["cases"]:
        model = start({**job, "start": other}, case)
        load(model, directory)
        traces.append(go_on(model, job["batches"][half:]))
    return traces


def main(job_file: str, result_file: str) -> None:
    """Run the job; rank 0 saves the traces and the checkpoint's tensors."""
    torch.distributed.init_process_group("gloo")
    job = torch.load(job_file, weights_only=False)
    traces = run(job)
    if torch.distributed.get_rank() == 0:
        tensors = dist_checkpointing.load_tensors_metadata(job["directory"])
        torch.save((traces, {name: tensor.global_shape for name, tensor in tensors.items()}), result_file)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


# The writer processes of a distributed checkpoint import this module.
if __name__ == "__main__":
    main(*sys.argv[1:])
