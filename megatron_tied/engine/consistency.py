"""A watchdog: do the ranks that should hold the same parameters still hold the same bits?"""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from megatron_tied.engine.groups import is_expert_parallel
from megatron_tied.exchange import gather_json
from megatron_tied.layers.tensor_parallel import is_tensor_parallel

_AT_ONCE = 1 << 22  # words of 4 bytes, for which 16 bytes each are taken meanwhile


@torch.no_grad()
def find_differences(model: torch.nn.Module) -> list[str]:
    """Names of parameters (and buffers) whose bits differ between ranks that should agree; the same on every rank.

    Replicated ones are compared over all ranks, parts of a matrix over data parallel ranks, experts over the ranks of
    their expert-DP group. Parameters that ZeRO 3 has partitioned exist once and are passed over. A collective.
    """
    replicated = {name: buffer for name, buffer in model.named_buffers() if _is_whole(buffer)}
    parts: dict[str, torch.Tensor] = {}
    experts: dict[str, torch.Tensor] = {}
    for name, weight in model.named_parameters():
        if _is_whole(weight):
            kind = experts if is_expert_parallel(weight) else parts if is_tensor_parallel(weight) else replicated
            kind[name] = weight
    differing = _differing(replicated)
    differing += _differing(parts, parallel_state.get_data_parallel_group())
    differing += _differing(experts, parallel_state.get_expert_data_parallel_group())
    return sorted({name for names in gather_json(differing) for name in names})


def _is_whole(tensor: torch.Tensor) -> bool:
    status = getattr(tensor, "ds_status", None)
    return tensor.numel() > 0 and (status is None or status.name == "AVAILABLE")


def _differing(tensors: dict[str, torch.Tensor], group: torch.distributed.ProcessGroup | None = None) -> list[str]:
    if not tensors or torch.distributed.get_world_size(group) == 1:
        return []
    lowest = torch.stack([checksum(tensor) for tensor in tensors.values()])
    highest = lowest.clone()
    torch.distributed.all_reduce(lowest, op=torch.distributed.ReduceOp.MIN, group=group)
    torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX, group=group)
    differs = (lowest != highest).any(dim=1).tolist()
    return [name for name, different in zip(tensors, differs, strict=True) if different]


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Two int64 sums over a tensor's bits, one of them weighted by position: [2]. Any single flipped bit changes it."""
    bits = tensor.detach().contiguous().flatten().view(torch.uint8)
    padding = -bits.numel() % 4
    words = torch.nn.functional.pad(bits, (0, padding)).view(torch.int32)
    sums = torch.zeros(2, dtype=torch.int64, device=words.device)
    for number, part in enumerate(words.split(_AT_ONCE)):
        numbers = part.to(torch.int64)
        positions = torch.arange(1, len(part) + 1, device=words.device).add_(number * _AT_ONCE)
        sums += torch.stack([numbers.sum(), numbers.mul_(positions).sum()])
    return sums
