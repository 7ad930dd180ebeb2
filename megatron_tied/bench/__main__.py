"""One rank of `megatron-tied bench`; the command that started it reads what the first rank prints."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from megatron_tied.bench.job import Job
from megatron_tied.bench.measurement import Progress, measure, measure_alone
from megatron_tied.bench.messages import PROBLEMS, PROGRESS, result_of, told_line
from megatron_tied.engine.groups import initialize_model_parallel
from megatron_tied.errors import ConfigError
from megatron_tied.training.startup import check_model, join_processes

_BAD_INPUT = 2


def run_job(job: Job, progress: Progress) -> dict[str, Any]:
    """Join the other ranks and measure `job`. A collective. Raises `ConfigError` on every rank alike."""
    join_processes()
    try:
        parallel = job.config.parallel
        initialize_model_parallel(parallel.expert_model_parallel_size, parallel.tensor_model_parallel_size)
        check_model(job.config)
        result = measure(job, progress) if job.alone is None else measure_alone(job)
        torch.distributed.barrier()
        return result
    finally:
        torch.distributed.destroy_process_group()


def main(path: str) -> int:
    """Carry out the job in the file `path`; returns the exit code."""
    job = Job.decode(Path(path).read_text(encoding="utf-8"))
    try:
        result = run_job(job, lambda *done: _tell(PROGRESS, done))
    except ConfigError as error:
        _tell(PROBLEMS, [(field, str(value), valid) for field, value, valid in map(astuple, error.problems)])
        return _BAD_INPUT
    if is_first():
        # Not among the lines of all ranks, of which a long one can be torn.
        result_of(Path(path)).write_text(json.dumps(result), encoding="utf-8")
    return 0


def _tell(kind: str, content: Any) -> None:
    if not is_first():
        return
    # Short, and in one piece: the lines of all ranks go into one pipe.
    sys.stdout.write(f"\n{told_line(kind, content)}\n")
    sys.stdout.flush()


def is_first() -> bool:
    """Whether this is the first rank, after it has left the others, too."""
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
