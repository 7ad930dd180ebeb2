"""The planner against real ranks: states by walking storages, peak by the allocator, traffic by the collectives."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from megatron_tied.engine import locations
from megatron_tied.planner import states
from tests.distributed.launch import launch
from tests.planner.measure import Case

STATES = [
    *(Case(ep=ep, stage=stage, group_size=4) for stage, ep in product((0, 1, 2, 3), (1, 2, 4))),
    *(Case(ep=2, stage=stage) for stage in (0, 1, 2, 3)),
    *(Case(ep=2, stage=stage, group_size=4, precision="bf16", accumulation=2) for stage in (1, 2, 3)),
    # Both recompute and tensor parallelism send more.
    Case(ep=4, stage=1, group_size=2, recompute="moe", accumulation=2),
    Case(ep=2, tp=2, stage=1, group_size=2),
    Case(ep=2, tp=2, stage=2, group_size=2, recompute="full", accumulation=2),
    Case(ep=2, stage=2, group_size=4, model={"expert_backend": "sequential"}),
    Case(ep=2, stage=2, group_size=4, optimizer="muon"),
    Case(ep=2, stage=1, group_size=4, share="experts_attention"),
    *(Case(ep=2, stage=stage, group_size=2, share="all") for stage in (2, 3)),
    Case(ep=2, stage=1, tied_experts=4),
]
# Slow: what they could show, each stage shows with tied experts at the same EP, or untied at EP 2.
UNTIED = [Case(ep=ep, stage=stage) for stage, ep in product((0, 1, 2, 3), (1, 4))]
LARGE: dict[str, Any] = {"micro_batch": 2, "seq_length": 128, "peak": True}
LARGER: dict[str, Any] = {"micro_batch": 4, "seq_length": 128, "peak": True}
# Banks that are much of the model, so that it shows how many copies of one are there.
WIDE: dict[str, Any] = {"micro_batch": 2, "seq_length": 64, "peak": True, "model": {"moe_ffn_hidden_size": 1536}}
PEAKS_OF_ONE_RANK = [
    Case(**LARGE, group_size=2),
    Case(**LARGE, group_size=4, precision="bf16"),
    Case(micro_batch=1, seq_length=384, group_size=2, peak=True),
    Case(micro_batch=16, seq_length=32, model={"moe_router_topk": 4}, peak=True),
    Case(**LARGE, group_size=2, stage=2, accumulation=2),
    Case(**LARGE, group_size=4, stage=3),
    Case(**LARGER, group_size=2, recompute="full"),
    Case(**LARGER, group_size=2, recompute="moe"),
    Case(**LARGER, group_size=2, recompute="moe_act"),
    Case(**LARGE, model={"vocab_size": 8192}),
    Case(**LARGE, model={"num_layers": 12, "num_query_groups": 4, "qk_layernorm": False}),
    Case(**LARGE, model={"moe_layer_freq": [0, 0, 1, 1, 1, 1], "moe_shared_expert_intermediate_size": 256}),
    # States are most of it: the update is the highest point.
    Case(group_size=2, model={"hidden_size": 256, "moe_ffn_hidden_size": 256}, peak=True),
    Case(group_size=2, optimizer="muon", model={"hidden_size": 256, "moe_ffn_hidden_size": 256}, peak=True),
]
PEAKS_OF_FOUR_RANKS = [
    Case(**WIDE, precision="bf16", accumulation=2),
    Case(**WIDE, precision="bf16", stage=2, group_size=4),
    Case(**WIDE, precision="bf16", stage=3),
    Case(**WIDE, precision="bf16", stage=3, group_size=4),
    Case(**WIDE, stage=3, ep=2, group_size=4, accumulation=2),
    Case(**LARGER, precision="bf16", ep=2, tp=2, group_size=4),
    Case(**LARGER, stage=2, ep=4, group_size=2, recompute="moe"),
]
Measured = dict[str, Any]


def on_cases(cases: Iterable[Case]) -> pytest.MarkDecorator:
    """For tests of these, and of the slow ones."""
    return pytest.mark.parametrize(
        "case", [*cases, *(pytest.param(case, marks=pytest.mark.slow) for case in UNTIED)], ids=str
    )


def _run(cases: Sequence[Case], world: int, directory: Path) -> dict[str, Measured]:
    given, result = directory / "cases.json", directory / "measured.json"
    # Upstream keeps engines of ZeRO 3, and groups with them, whose threads wake up all the time: those come last.
    ordered = sorted(cases, key=lambda case: case.stage)
    given.write_text(json.dumps([asdict(case) for case in ordered]))
    launch("tests.planner.measure", world, str(given), str(result))
    return dict(zip(map(str, ordered), json.loads(result.read_text()), strict=True))


@pytest.fixture(scope="module")
def on_four_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measured]:
    return _run([*STATES, *PEAKS_OF_FOUR_RANKS], 4, tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def untied_on_four_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measured]:
    return _run(UNTIED, 4, tmp_path_factory.mktemp("untied"))


@pytest.fixture(scope="module")
def on_one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measured]:
    return _run(PEAKS_OF_ONE_RANK, 1, tmp_path_factory.mktemp("one"))


@pytest.fixture
def measured(case: Case, request: pytest.FixtureRequest) -> Measured:
    """What came out for the test's case on four ranks, launched once for all cases that are not slow."""
    return request.getfixturevalue("untied_on_four_ranks" if case in UNTIED else "on_four_ranks")[str(case)]


@on_cases(STATES)
def test_states_are_what_is_allocated(measured: Measured) -> None:
    assert measured["planned states"] == pytest.approx(measured["states"], rel=0.01)


@on_cases(STATES)
def test_what_a_run_reports_is_weights_and_optimizer_states(measured: Measured) -> None:
    parts = measured["parts"]
    assert measured["reported states"] == pytest.approx(parts["weights"] + parts["optimizer"], rel=0.01)


# What Muon sends to have whole matrices is not planned.
@on_cases(case for case in STATES if case.optimizer == "adamw")
def test_traffic_is_what_collectives_carry(measured: Measured) -> None:
    planned = measured["planned traffic"]
    for kind in planned.keys() | measured["traffic"].keys():
        # Norms, overflow flags and token counts are not planned: a thousandth of everything may be theirs.
        slack = 0.002 * sum(planned.values())
        assert planned.get(kind, 0) == pytest.approx(measured["traffic"].get(kind, 0), rel=0.01, abs=slack), kind


@pytest.mark.parametrize("case", PEAKS_OF_ONE_RANK, ids=str)
def test_peak_is_what_the_allocator_gave_out(on_one_rank: dict[str, Measured], case: Case) -> None:
    measured = on_one_rank[str(case)]
    assert measured["planned peak"] == pytest.approx(measured["peak"], rel=0.1)


@pytest.mark.parametrize("case", PEAKS_OF_FOUR_RANKS, ids=str)
def test_peak_of_four_ranks(measured: Measured) -> None:
    # Wider than on one rank: how long gloo's threads hold a reduced tensor differs from run to run, by some percent.
    assert measured["planned peak"] == pytest.approx(measured["peak"], rel=0.15)


def test_muon_works_on_as_many_elements_at_once_as_is_planned() -> None:
    assert states.MUON_AT_ONCE == locations.MOST


def test_peaks_are_more_than_states(on_one_rank: dict[str, Measured]) -> None:
    """Else the comparison above would say little about activations."""
    shares = [measured["parts"]["activations"] / measured["planned peak"] for measured in on_one_rank.values()]
    assert sum(share > 0.25 for share in shares) >= 6
