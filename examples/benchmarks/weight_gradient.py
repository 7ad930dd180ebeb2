"""A bank's weight gradient over the layers of its tie group: as autograd makes it, added in place, and fused.

    python examples/benchmarks/weight_gradient.py [THREADS]

Prints a table as Markdown: times as shares of autograd's, which multiplies for each layer and adds the products up. The
ways take turns; of each, the fastest of nine turns counts. First with the C library as it is, then as training has it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from megatron_tied.layers.weight_gradient import Site, add_gradient_of, gradient_of, gradient_of_all
from megatron_tied.platform.host import device, reuse_large_blocks

EXPERTS, LAYERS, TURNS = 64, 4, 9
SHAPES = ((512, 512), (256, 512), (512, 256))  # in and out
TOKENS = (4, 16, 64, 256, 1024)  # per expert and layer


def main(threads: int) -> None:
    """Measure all sizes, and print the table."""
    torch.set_num_threads(threads)
    print(f"{EXPERTS} experts, {LAYERS} layers, fp32, {threads} threads; torch {torch.__version__}\n")
    print("| tokens per expert | in x out | autograd | GFLOP/s | added in place | fused |")
    print("|---|---|---|---|---|---|")
    for name, tune in (("as it is", lambda: None), ("memory used again", reuse_large_blocks)):
        tune()
        print(f"| | | *{name}* | | | |")
        for tokens in TOKENS:
            for width, out in SHAPES:
                seconds = measure([site(tokens, width, out) for _ in range(LAYERS)])
                whole = seconds[by_autograd]
                rate = 2 * LAYERS * EXPERTS * tokens * width * out / whole / 1e9
                shares = (f"{seconds[way] / whole:.2f}" for way in (in_place, gradient_of_all))
                print(f"| {tokens} | {width} x {out} | {1e3 * whole:.1f} ms | {rate:.0f} | {' | '.join(shares)} |")


def site(tokens: int, width: int, out: int) -> Site:
    """What one layer gives, its tokens spread over experts by chance."""
    total = EXPERTS * tokens
    counts = torch.bincount(torch.randint(EXPERTS, (total,)), minlength=EXPERTS)
    tensors = torch.randn(total, width), torch.randn(total, out), counts.cumsum(0).to(torch.int32)
    return Site(*(tensor.to(device()) for tensor in tensors))


def by_autograd(sites: list[Site]) -> torch.Tensor:
    """Products, added up."""
    total = gradient_of(sites[0])
    for other in sites[1:]:
        total = total + gradient_of(other)
    return total


def in_place(sites: list[Site]) -> torch.Tensor:
    """`tie.weight_gradient: immediate`."""
    total = gradient_of(sites[0])
    for other in sites[1:]:
        add_gradient_of(other, total)
    return total


Way = Callable[[list[Site]], torch.Tensor]


def measure(sites: list[Site]) -> dict[Way, float]:
    """Seconds of each way; all give the same."""
    ways: tuple[Way, ...] = (by_autograd, in_place, gradient_of_all)
    results = [way(sites) for way in ways]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-3)
    del results
    seconds: dict[Way, list[float]] = {way: [] for way in ways}
    for _ in range(TURNS):
        for way in ways:
            _synchronize()
            began = time.perf_counter()
            way(sites)
            _synchronize()
            seconds[way].append(time.perf_counter() - began)
    return {way: min(times) for way, times in seconds.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:] or ["2"]))
