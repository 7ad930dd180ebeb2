"""What a native run may differ in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NativeCase:
    """One cell: parallelism, what Megatron-Core overlaps and shards, and how the experts came to be tied."""

    ep: int = 1
    pp: int = 1
    vp: int | None = None
    accumulation: int = 1
    distributed_optimizer: bool = False
    overlap: bool = False
    recompute: str = "none"
    built: str = "tied spec"  # or "upstream spec": Megatron-Core's own layers, tied when they are built
    pipeline: str = "align"
    lr_divisor: str = "sqrt"
