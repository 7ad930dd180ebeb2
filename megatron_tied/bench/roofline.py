"""What this machine can do at best: matrix products, and copies, in the precision and with the threads of a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_tied.platform import device

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Large enough for full speed, and done in well under a second.
_SIDE_CPU, _SIDE_GPU = 1536, 8192
_COPY_BYTES_CPU, _COPY_BYTES_GPU = 1 << 28, 1 << 31
_SECONDS = 0.5


@dataclass(frozen=True)
class Ceilings:
    """Of one rank while all ranks are at it: FLOP/s of a square matrix product; bytes read and written by a copy."""

    flops_per_second: float
    bytes_per_second: float

    def or_better(self, other: Ceilings) -> Ceilings:
        """The higher ones: what a machine that others use reached at some time, it can reach."""
        return Ceilings(
            max(self.flops_per_second, other.flops_per_second), max(self.bytes_per_second, other.bytes_per_second)
        )


@torch.no_grad()
def measure_ceilings(precision: str) -> Ceilings:
    """The best of repeated products and copies; a collective."""
    on_gpu = torch.cuda.is_available()
    side = _SIDE_GPU if on_gpu else _SIDE_CPU
    left, right = (torch.randn(side, side, device=device()).to(_DTYPES[precision]) for _ in range(2))
    product = torch.empty_like(left)
    gemm = _best(lambda: torch.mm(left, right, out=product))
    size = _COPY_BYTES_GPU if on_gpu else _COPY_BYTES_CPU
    source = torch.ones(size, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    copy = _best(lambda: target.copy_(source))
    return Ceilings(2 * side**3 / gemm, 2 * size / copy)


def _best(action: Callable[[], object]) -> float:
    action()
    synchronize()
    torch.distributed.barrier()
    times: list[float] = []
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end or len(times) < 3:
        began = time.perf_counter()
        action()
        synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


def synchronize() -> None:
    """Wait until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
