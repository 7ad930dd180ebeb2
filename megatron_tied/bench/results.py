"""What a benchmark finds, as the file of --json has it: seconds, bytes and FLOP/s of the first rank."""

from __future__ import annotations

from typing import Any, TypedDict


class Operator(TypedDict):
    """An operator of torch, or a kernel, and its share of the time of a step."""

    name: str
    kind: str
    share: float


class Shares(TypedDict):
    """Where time went: by kind of operator, and to the operators that took most of it."""

    shares: dict[str, float]
    largest: list[Operator]


class Kernels(Shares):
    """Of one step, which took so many seconds."""

    seconds: float


class Pairs(TypedDict):
    """`Comparison`: `ratio` is null where none may be told, `spread` where there are too few pairs."""

    ratio: float | None
    spread: float | None
    minimum: float
    maximum: float
    pairs: list[float]
    told: str


class Hardware(TypedDict):
    """The host."""

    processor: str
    cores: int
    memory: int
    gpus: list[str]


class Ceilings(TypedDict):
    """The best that a rank reached, measured by itself."""

    gemm_flops_per_second: float
    copy_bytes_per_second: float


class Row(TypedDict):
    """One contender. peak_memory, bank_gathers: null where they are not known, or where nothing is gathered.

    share_of_copy_bandwidth_in_optimizer: null for Muon.
    """

    parameters: int
    first_loss: float
    seconds: list[float]
    seconds_of_a_step: float
    tokens_per_second: float
    phases: dict[str, float]
    states: dict[str, int]
    peak_memory: int | None
    reduction_bytes: dict[str, int]
    bank_gathers: float | None
    kernels: Kernels
    flops_per_second: float
    share_of_gemm_ceiling: float
    share_of_copy_bandwidth_in_optimizer: float | None


class Result(TypedDict):
    """One config, its contenders by name; `comparisons` are of tied with each of the others."""

    config: dict[str, Any]
    topology: str
    ranks: int
    rounds: int
    steps_of_a_turn: int
    tokens_of_a_step: int
    threads: int
    device: str
    hardware: Hardware
    software: dict[str, str]
    ceilings: Ceilings
    contenders: dict[str, Row]
    left_out: dict[str, str]
    comparisons: dict[str, Pairs]
