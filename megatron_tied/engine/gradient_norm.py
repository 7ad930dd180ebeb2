"""The true global gradient norm where DeepSpeed has none: ZeRO stage 0 with expert parallelism."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core import parallel_state

from megatron_tied.engine.groups import is_expert_parallel
from megatron_tied.layers.tensor_parallel import is_tensor_parallel
from megatron_tied.platform import device


@torch.no_grad()
def global_gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> float:
    """L2 norm over the parameters of all ranks, the same number on every rank.

    To be called when gradients are reduced: each counts once, however many ranks hold it. DeepSpeed's stage 0 takes
    the mean over ranks of norms that know one rank's experts each, which is too small.
    """
    total = torch.zeros((), device=device())
    for parameter in parameters:
        if parameter.grad is not None:
            total += parameter.grad.float().square().sum() / _holders(parameter)
    torch.distributed.all_reduce(total)
    return total.sqrt().item()


def _holders(parameter: torch.nn.Parameter) -> int:
    holders: int = torch.distributed.get_world_size()
    if is_expert_parallel(parameter):
        holders = parallel_state.get_expert_data_parallel_world_size()
    elif is_tensor_parallel(parameter):
        holders = parallel_state.get_data_parallel_world_size()
    return holders


@torch.no_grad()
def clip_gradients(parameters: Iterable[torch.nn.Parameter], norm: float, max_norm: float) -> None:
    """Scale gradients in place so that a global norm of `norm` becomes at most `max_norm`.

    The factor is that of `torch.nn.utils.clip_grad_norm_`.
    """
    factor = min(1.0, max_norm / (norm + 1e-6))
    if factor < 1.0:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
