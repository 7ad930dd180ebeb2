"""The model parallel unit that DeepSpeed is given with tensor parallelism: its names for Megatron-Core's groups."""

from __future__ import annotations

from megatron.core.parallel_state import (
    get_data_parallel_group,
    get_data_parallel_rank,
    get_data_parallel_world_size,
)
from megatron.core.parallel_state import get_tensor_model_parallel_group as get_model_parallel_group
from megatron.core.parallel_state import get_tensor_model_parallel_rank as get_model_parallel_rank
from megatron.core.parallel_state import get_tensor_model_parallel_world_size as get_model_parallel_world_size
from torch.distributed import get_process_group_ranks

__all__ = [
    "get_data_parallel_group",
    "get_data_parallel_group_ranks",
    "get_data_parallel_rank",
    "get_data_parallel_world_size",
    "get_model_parallel_group",
    "get_model_parallel_rank",
    "get_model_parallel_world_size",
]


def get_data_parallel_group_ranks() -> list[int]:
    """The global ranks of this rank's data parallel group."""
    return get_process_group_ranks(get_data_parallel_group())
