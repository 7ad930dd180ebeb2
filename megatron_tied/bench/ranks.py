"""The ranks that measure: together while they do, and one of them speaks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_tied.engine.groups import initialize_model_parallel
from megatron_tied.training.config import RunConfig
from megatron_tied.training.startup import check_model, join_processes


@contextmanager
def together(config: RunConfig) -> Iterator[None]:
    """With process groups for `config`; a collective. Raises `ConfigError` on every rank alike."""
    join_processes()
    try:
        parallel = config.parallel
        initialize_model_parallel(parallel.expert_model_parallel_size, parallel.tensor_model_parallel_size)
        check_model(config)
        yield
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def is_first() -> bool:
    """Whether this is the first rank, after it has left the others, too."""
    return os.environ.get("RANK", "0") == "0"
