"""Prepares the host before any test imports Megatron-Core or DeepSpeed."""

from collections.abc import Iterator

import pytest
import torch

from megatron_tied.platform import prepare

prepare()


@pytest.fixture(scope="session")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Megatron-Core's process groups for this process alone, on a torch.distributed that the user has started."""
    from megatron.core import parallel_state

    from megatron_tied import initialize_model_parallel

    rendezvous = tmp_path_factory.mktemp("rendezvous") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
