"""Newton-Schulz iterations over the experts of a bank: all at once, against torch.optim.Muon's way, one by one.

Usage: newton_schulz.py [THREADS]. Prints a table; times are medians of turns, each way in every turn.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, EPS, _zeropower_via_newtonschulz

from megatron_tied.engine.newton_schulz import STEPS, orthogonalized

EXPERTS, TURNS = 64, 15
# Of the paper's olmoe tiny, and narrower ones.
SHAPES = [(32, 32), (64, 64), (128, 64), (128, 128), (256, 128), (256, 256), (512, 256), (512, 512)]


def one_by_one(matrices: torch.Tensor) -> torch.Tensor:
    """What `torch.optim.Muon` does with each of `matrices` [n, rows, columns]."""
    return torch.stack(
        [_zeropower_via_newtonschulz(matrix, (DEFAULT_A, DEFAULT_B, DEFAULT_C), STEPS, EPS) for matrix in matrices]
    )


def at_once(matrices: torch.Tensor) -> torch.Tensor:
    """The same, all of them together."""
    return orthogonalized(matrices.bfloat16())


def seconds(way: Callable[[torch.Tensor], torch.Tensor], matrices: torch.Tensor) -> float:
    """Of one call."""
    began = time.perf_counter()
    way(matrices)
    if matrices.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    """Measures every shape."""
    if len(sys.argv) > 1:
        torch.set_num_threads(int(sys.argv[1]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{EXPERTS} experts, {STEPS} iterations, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| rows x columns | one by one | at once | one by one / at once | largest difference |")
    print("|---|---|---|---|---|")
    for shape in SHAPES:
        matrices = torch.randn(EXPERTS, *shape, device=device)
        difference = (one_by_one(matrices).float() - at_once(matrices).float()).abs().max()
        times = [(seconds(one_by_one, matrices), seconds(at_once, matrices)) for _ in range(TURNS)]
        alone, together = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(first / second for first, second in times)
        print(
            f"| {shape[0]} x {shape[1]} | {alone * 1e3:.1f} ms | {together * 1e3:.1f} ms | {ratio:.1f} | "
            f"{difference:.2g} |"
        )


if __name__ == "__main__":
    main()
