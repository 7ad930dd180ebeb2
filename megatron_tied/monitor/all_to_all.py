"""What the all-to-all of expert parallelism moves, and how long it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_tied.monitor.stopwatch import Stopwatch
from megatron_tied.planner.hardware import GB
from megatron_tied.platform import device


class AllToAllMeter:
    """Counts, while `measuring`, the bytes that this rank sends to others of its expert parallel group, and the time.

    Forward, backward and recompute alike. The time includes waiting for the slowest rank. Dispatchers with kernels
    of their own (`flex`) are not seen.
    """

    def __init__(self) -> None:
        self._bytes = 0
        self._stopwatch = Stopwatch()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Wraps `torch.distributed.all_to_all_single`, which Megatron-Core calls in forward and backward."""
        original = torch.distributed.all_to_all_single
        torch.distributed.all_to_all_single = self._counted(original)
        try:
            yield
        finally:
            torch.distributed.all_to_all_single = original

    def _counted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        expert_parallel = parallel_state.get_expert_model_parallel_group()

        def all_to_all_single(
            output: torch.Tensor,
            input: torch.Tensor,
            output_split_sizes: Sequence[int] | None = None,
            input_split_sizes: Sequence[int] | None = None,
            group: torch.distributed.ProcessGroup | None = None,
            async_op: bool = False,
        ) -> Any:
            arguments = (output, input, output_split_sizes, input_split_sizes, group, async_op)
            if group is not expert_parallel:
                return original(*arguments)
            self._bytes += _bytes_to_others(input, input_split_sizes, group)
            with self._stopwatch.running():
                return original(*arguments)

        return all_to_all_single

    def take(self) -> dict[str, float]:
        """all_to_all/gb (10^9 bytes) and all_to_all/seconds since the last call, mean over ranks; a collective.

        Without expert parallelism nothing, and no collective.
        """
        if parallel_state.get_expert_model_parallel_world_size() == 1:
            return {}
        found = torch.tensor([self._bytes / GB, self._stopwatch.take()], dtype=torch.float64, device=device())
        self._bytes = 0
        torch.distributed.all_reduce(found)
        gigabytes, seconds = (found / torch.distributed.get_world_size()).tolist()
        return {"all_to_all/gb": gigabytes, "all_to_all/seconds": seconds}


def _bytes_to_others(sent: torch.Tensor, splits: Sequence[int] | None, group: torch.distributed.ProcessGroup) -> int:
    if splits is None:
        return sent.nbytes - sent.nbytes // group.size()
    row = sent.nbytes // len(sent) if len(sent) else 0
    return row * (sum(splits) - splits[group.rank()])
