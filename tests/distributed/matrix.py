"""The oracle's matrices: which cases, on which job, compared how.

`python -m tests.distributed.matrix parallelism OUT.md` and `... regimes OUT.md` run all cells and write the tables.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import torch

from tests.distributed.launch import launch
from tests.distributed.training_run import HYPERPARAMETERS, Case
from tests.oracle.reference import (
    ReferenceTrace,
    Weights,
    build_reference,
    random_batches,
    tiny,
    train_reference,
    weights,
)

ARCHITECTURES = ("olmoe", "qwen3_moe")
WORLDS = ((1, 1), (2, 1), (2, 2), (4, 2), (4, 4))
SEQUENCE = 16
# With these seeds no token of any step comes near another choice of experts, and no query, key or value near the edge
# of the clip: there rounding could flip a choice, and change gradients by more than rounding.
SEEDS = {"olmoe": 7, "qwen3_moe": 14, "deepseek_v2": 10}
OPTIMIZER = {"lr": 1e-3, "weight_decay": 0.1, "clip_grad": 1.0}
LIMITS = {"loss": 1e-5, "first gradient": 1e-5, "last gradient": 1e-5, "final weight": 1e-4}


@dataclass(frozen=True)
class Job:
    """What both sides train: an architecture with its banks, for `steps` global batches."""

    arch: str
    banks: tuple[int, ...] = (0, 1, 1, 2, 2, 3)
    steps: int = 10
    global_batch: int = 8
    share: str = "experts"
    seed: int | None = None  # where that of the architecture comes near another choice


@cache
def material(job: Job) -> dict[str, Any]:
    """The reference's spec and initial weights, the batches, and the optimizer's settings."""
    spec = tiny(job.arch, job.banks, share=job.share)
    seed = SEEDS[job.arch] if job.seed is None else job.seed
    return {
        "spec": spec,
        "start": weights(build_reference(spec, seed)),
        "batches": random_batches(spec, job.steps, job.global_batch, SEQUENCE, seed),
        **OPTIMIZER,
    }


@cache
def reference(job: Job, micro_batches: int, lr_divisor: str) -> ReferenceTrace:
    """The oracle's run with `micro_batches` = data parallel size x accumulation."""
    work = material(job)
    power = {"sqrt": -0.5, "linear": -1.0}[lr_divisor]
    return train_reference(
        work["spec"],
        work["start"],
        work["batches"],
        micro_batches=micro_batches,
        no_decay_1d=True,
        lr_scale_of_bank={bank: job.banks.count(bank) ** power for bank in job.banks},
        **OPTIMIZER,
        **HYPERPARAMETERS,
    )


def run_cases(job: Job, world: int, cases: Sequence[Case], **options: Any) -> list[dict[str, float]]:
    """The worst relative errors of each case against the oracle; all cases share one launch."""
    traces = run_traces(job, world, cases, **options)
    return [
        worst_errors(trace, reference(job, world // case.tp * case.accumulation, case.lr_divisor))
        for case, trace in zip(cases, traces, strict=True)
    ]


def run_traces(
    job: Job, world: int, cases: Sequence[Any], worker: str = "tests.distributed.oracle_worker", **options: Any
) -> list[dict[str, Any]]:
    """What the ranks of `worker` recorded, a trace for each case; `options` go to the worker."""
    with tempfile.TemporaryDirectory() as directory:
        job_file, result_file = Path(directory, "job"), Path(directory, "result")
        torch.save({**material(job), "cases": list(cases), **options}, job_file)
        launch(worker, world, str(job_file), str(result_file))
        return torch.load(result_file, weights_only=False)


def worst_errors(trace: dict[str, Any], expected: ReferenceTrace) -> dict[str, float]:
    """The largest relative error of any step's figures, and of any parameter's tensor in the Euclidean norm."""
    figures = [
        abs(value - getattr(step, name)) / abs(getattr(step, name))
        for values, step in zip(trace["steps"], expected.steps, strict=True)
        for name, value in values.items()
    ]
    return {
        "loss": torch.tensor(figures).max().item(),  # NaN if one is
        "first gradient": _worst_tensor(trace["first_gradients"], expected.first_gradients),
        "last gradient": _worst_tensor(trace["last_gradients"], expected.last_gradients),
        "final weight": _worst_tensor(trace["final_weights"], expected.final_weights),
    }


def _worst_tensor(found: Weights, expected: Weights) -> float:
    assert found.keys() == expected.keys()
    errors = [(found[name] - value).norm() / value.norm() for name, value in expected.items()]
    return torch.stack(errors).max().item()


def parallelism_table(stream: TextIO) -> bool:
    """Every (world, EP) x ZeRO stage x accumulation, both architectures; True if all are within the limits."""
    within = True
    header = ["arch", "world", "EP", "ZeRO", "accumulation"]
    stream.write(_row([*header, *LIMITS]) + _row(["---"] * (len(header) + len(LIMITS))))
    for arch in ARCHITECTURES:
        for world, ep in WORLDS:
            cases = [Case(ep=ep, stage=stage, accumulation=steps) for stage in range(4) for steps in (1, 2)]
            for case, errors in zip(cases, run_cases(Job(arch), world, cases), strict=True):
                within &= all(errors[name] <= limit for name, limit in LIMITS.items())
                stream.write(_row([arch, world, ep, case.stage, case.accumulation, *_figures(errors)]))
                stream.flush()
    return within


def regime_cases(accumulations: Sequence[int] = (1, 3), overlaps: Sequence[bool] = (False, True)) -> list[Case]:
    """Every way to recompute x ZeRO stage x overlap x accumulation."""
    return [
        Case(ep=2, stage=stage, accumulation=accumulation, recompute=recompute, overlap=overlap)
        for recompute in ("none", "moe", "full", "non_reentrant")
        for stage in range(4)
        for overlap in overlaps
        for accumulation in accumulations
    ]


def regime_job(group_size: int) -> Job:
    """A model with one tie group of `group_size` layers between two untied ones, for the table of regimes."""
    return Job("olmoe", (0, *[1] * group_size, 2), steps=3, global_batch=6)


def regime_table(stream: TextIO) -> bool:
    """Every regime for g = 2 and 3, EP 2 on 2 ranks; True if all are within the limits."""
    within = True
    header = ["g", "recompute", "ZeRO", "overlap_comm", "accumulation"]
    stream.write(_row([*header, *LIMITS]) + _row(["---"] * (len(header) + len(LIMITS))))
    for group_size in (2, 3):
        cases = regime_cases()
        for case, errors in zip(cases, run_cases(regime_job(group_size), 2, cases), strict=True):
            within &= all(errors[name] <= limit for name, limit in LIMITS.items())
            cells = [group_size, case.recompute, case.stage, "on" if case.overlap else "off", case.accumulation]
            stream.write(_row([*cells, *_figures(errors)]))
    return within


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |\n"


def _figures(errors: dict[str, float]) -> list[str]:
    return [f"{errors[name]:.1e}" for name in LIMITS]


if __name__ == "__main__":
    make_table = {"parallelism": parallelism_table, "regimes": regime_table}[sys.argv[1]]
    with open(sys.argv[2], "w", encoding="utf-8") as table:
        sys.exit(0 if make_table(table) else 1)
