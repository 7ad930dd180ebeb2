"""The README's table of supported combinations, made from the cases that the tests compare with plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

from tests.distributed import test_oracle_matrix, test_regimes, test_semantics, test_tensor_parallel
from tests.distributed.training_run import Case

_RECOMPUTE = {
    "none": "no recompute",
    "moe": "recompute: selective, `moe`",
    "moe_act": "recompute: selective, `moe_act`",
    "layernorm": "recompute: selective, `layernorm`",
    "core_attn": "recompute: selective, `core_attn`",
    "mla_up_proj": "recompute: selective, `mla_up_proj`",
    "full": "recompute: full, uniform, per layer",
    "full_by_5": "recompute: full, one segment per tie group",
    "block": "recompute: full, block",
    "non_reentrant": "recompute: torch's non-reentrant, per layer (from Python)",
}


def cases() -> list[Case]:
    """Every case whose losses, gradients and weights some test compares with the oracle."""
    by_world = [*test_oracle_matrix.SUBSET.values(), *test_tensor_parallel.ORACLE.values()]
    return [*test_regimes.REGIMES, *test_oracle_matrix.LATENT, *(case for group in by_world for case in group)]


def table() -> str:
    """Markdown: a row for each option, a column for each ZeRO stage; "yes" where a test proves the pair."""
    proven = cases()
    rows: list[tuple[str, Callable[[Case], bool]]] = [
        (name, lambda case, kind=kind: case.recompute == kind) for kind, name in _RECOMPUTE.items()
    ]
    rows += [
        ("gradient accumulation", lambda case: case.accumulation > 1),
        ("`overlap_comm`", lambda case: case.overlap),
        ("expert parallelism", lambda case: case.ep > 1),
        ("tensor and sequence parallel attention", lambda case: case.tp > 1),
        ("multi-head latent attention", lambda case: case in test_oracle_matrix.LATENT),
        ("experts: `grouped`", lambda case: case.backend == "grouped"),
        ("experts: `sequential`", lambda case: case.backend == "sequential"),
        ("dispatcher: `alltoall`", lambda case: case.dispatcher == "alltoall"),
        ("dispatcher: `allgather`", lambda case: case.dispatcher == "allgather"),
    ]
    lines = ["| | ZeRO 0 | ZeRO 1 | ZeRO 2 | ZeRO 3 |", "|---|---|---|---|---|"]
    for name, has in rows:
        stages = {case.stage for case in proven if has(case)}
        lines.append(f"| {name} | {' | '.join('yes' if stage in stages else '' for stage in range(4))} |")
    variants = "; ".join(test_semantics.VARIANTS)
    lines += ["", f"With expert parallelism 2 equal to 1, in losses and weights: {variants}."]
    return "\n".join(lines) + "\n"
