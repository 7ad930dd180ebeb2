"""Prepares the host before any test imports Megatron-Core or DeepSpeed."""

import signal
from collections.abc import Iterator

import pytest
import torch

from megatron_tied.platform import prepare

prepare()

# A shell starts its background jobs with SIGINT ignored, and what they start inherits it: tests press Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Process groups of one, made as a user's own script makes them: without this package and without DeepSpeed."""
    from megatron.core import parallel_state

    rendezvous = tmp_path_factory.mktemp("rendezvous") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
