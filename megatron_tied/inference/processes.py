"""Process groups for a model in one process: Megatron-Core's layers ask for them, however few ranks there are."""

# ruff: noqa: E402  (Megatron-Core must be imported after the host is prepared)
from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_tied.platform import prepare

prepare()

from megatron.core import parallel_state


@contextmanager
def one_process() -> Iterator[None]:
    """Process groups of this process alone, unless there are some; they are gone when the context ends."""
    if torch.distributed.is_initialized():
        yield
        return
    # Nobody else is to be reached, nor to reach us.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with tempfile.TemporaryDirectory() as directory:
        torch.distributed.init_process_group(backend, init_method=f"file://{directory}/store", rank=0, world_size=1)
        try:
            parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
            yield
        finally:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()
