"""One rank of the native matrix: trains every case and leaves the traces for the test to compare."""

from __future__ import annotations

import sys
from typing import Any

import torch

from tests.megatron_lm.cases import NativeCase
from tests.megatron_lm.ranks.native_run import NativeModel, initialize
from tests.process_groups import leave_groups


def run_case(job: dict[str, Any], case: NativeCase) -> dict[str, Any]:
    """Train one case; returns what `ReferenceTrace` holds."""
    leave_groups()
    initialize(
        pipeline_model_parallel_size=case.pp,
        virtual_pipeline_model_parallel_size=case.vp,
        expert_model_parallel_size=case.ep,
    )
    model = NativeModel(job["spec"], case, job)
    recorded: dict[int, Any] = {}
    steps = []
    last = len(job["batches"]) - 1
    for index, batch in enumerate(job["batches"]):

        def keep_gradients(index: int = index) -> None:
            if index in (0, last):
                recorded[index] = model.gradients()

        steps.append(model.step(batch, keep_gradients))
    return {
        "steps": steps,
        "first_gradients": recorded[0],
        "last_gradients": recorded[last],
        "final_weights": model.weights(),
    }


def main(job_file: str, result_file: str) -> None:
    """Run all cases of the job; rank 0 saves the traces."""
    torch.distributed.init_process_group("gloo")
    job = torch.load(job_file, weights_only=False)
    traces = [run_case(job, case) for case in job["cases"]]
    if torch.distributed.get_rank() == 0:
        torch.save(traces, result_file)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
