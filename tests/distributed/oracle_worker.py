"""One rank of the oracle matrix: trains every case it is given and leaves the traces for the test to compare."""

from __future__ import annotations

import sys
from typing import Any

import torch

from megatron_tied.layers.accumulation import SharedGradient
from megatron_tied.layers.weight_gradient import gradient_of
from tests.distributed.training_run import (
    Case,
    build_engine,
    full_gradients,
    full_weights,
    gather,
    model_parallel,
    step,
)


def run_case(job: dict[str, Any], case: Case) -> dict[str, Any]:
    """Train one case; returns what `ReferenceTrace` holds."""
    spec = job["spec"]
    with model_parallel(case.ep, case.tp):
        engine = build_engine(spec, case, job["start"], job["lr"], job["weight_decay"], job["clip_grad"])
        recorded: dict[int, Any] = {}
        steps = []
        for index, batch in enumerate(job["batches"]):

            def keep_gradients(index: int = index) -> None:
                if index in (0, len(job["batches"]) - 1):
                    recorded[index] = gather(engine.module, spec, full_gradients(engine.module))

            steps.append(step(engine, batch, case.accumulation, keep_gradients))
        first, last = recorded[0], recorded[len(job["batches"]) - 1]
        weights = gather(engine.module, spec, full_weights(engine.module))
        engine.destroy()
    return {"steps": steps, "first_gradients": first, "last_gradients": last, "final_weights": weights}


def main(job_file: str, result_file: str) -> None:
    """Run all cases of the job; rank 0 saves the traces.

    With `without_accumulation` each use site's gradient goes straight to DeepSpeed, as it would without this
    project; what DeepSpeed asserts is recorded, and must come last since it leaves the engine unusable.
    """
    job = torch.load(job_file, weights_only=False)
    if job.get("without_accumulation"):
        SharedGradient.add = lambda self, site: gradient_of(site)
    traces = []
    for case in job["cases"]:
        try:
            traces.append(run_case(job, case))
        except AssertionError as error:
            traces.append({"assertion": str(error)})
            break
    if torch.distributed.get_rank() == 0:
        torch.save(traces, result_file)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
