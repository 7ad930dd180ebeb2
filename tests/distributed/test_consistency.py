"""Ranks that should hold the same parameters hold the same bits, however long they train."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.distributed.consistency_worker import CLIP, Run
from tests.distributed.launch import launch

RUNS = {
    2: [
        *(Run(ep=2, stage=stage, steps=6) for stage in range(4)),
        *(Run(ep=2, stage=stage, steps=6, precision="bf16") for stage in (1, 2, 3)),
        *(Run(ep=2, stage=stage, steps=4, starved=True) for stage in range(4)),
        Run(ep=1, stage=0, steps=4, starved=True),
        Run(ep=2, stage=0, steps=3, broken="clip"),
    ],
    4: [
        *(Run(ep=2, stage=stage, steps=10) for stage in range(4)),
        *(Run(ep=4, stage=stage, steps=6) for stage in range(4)),
        Run(ep=2, stage=0, steps=3, broken="clip"),
        Run(ep=2, stage=0, steps=3, broken="reduction"),
    ],
}
INITIAL = {
    2: [(1, "grouped"), (2, "sequential")],
    4: [(1, "grouped"), (2, "grouped"), (4, "grouped"), (4, "sequential")],
}

SOUND = [(world, run) for world, runs in RUNS.items() for run in runs if not run.broken]

Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What each rank of a world found; the parameter is the world's size, launched once for all its tests."""
    world, directory = request.param, tmp_path_factory.mktemp("consistency")
    torch.save({"runs": RUNS[world], "initial": INITIAL[world]}, directory / "job")
    launch("tests.distributed.consistency_worker", world, str(directory / "job"), str(directory / "result"))
    return torch.load(directory / "result", weights_only=False)


def results(ranks: Ranks, run: Run) -> Ranks:
    return [rank["runs"][run] for rank in ranks]


def replicated_that_differ(ranks: Ranks) -> list[str]:
    names = ranks[0]["after"].keys() - ranks[0]["experts"]
    return sorted(name for name in names if len({rank["after"][name] for rank in ranks}) > 1)


def experts_that_differ_between_peers(ranks: Ranks) -> list[str]:
    shards = {(rank["ep_rank"], name, rank["after"][name]) for rank in ranks for name in rank["experts"]}
    places = [(ep_rank, name) for ep_rank, name, _ in shards]
    return sorted({name for ep_rank, name in places if places.count((ep_rank, name)) > 1})


def title(case: Any) -> str:
    if isinstance(case, int):
        return f"world={case}"
    return "-".join(f"{key}={value}" for key, value in vars(case).items() if value not in ("", False))


def on_ranks(*cases: Any) -> pytest.MarkDecorator:
    """For tests of the given worlds, or of (world, run) pairs."""
    names = ("ranks", "run") if isinstance(cases[0], tuple) else "ranks"
    return pytest.mark.parametrize(names, cases, indirect=["ranks"], ids=title, scope="module")


@on_ranks(*SOUND)
def test_replicas_are_bit_equal(ranks, run):
    found = results(ranks, run)
    assert replicated_that_differ(found) == []
    assert experts_that_differ_between_peers(found) == []


@on_ranks(*((world, run) for world, run in SOUND if not run.starved))
def test_the_comparison_is_about_something(ranks, run):
    found = results(ranks, run)
    assert {rank["ep_rank"] for rank in found} == set(range(run.ep))
    for rank in found:
        assert len(rank["experts"]) == 6
        assert all(rank["before"][name] != rank["after"][name] for name in rank["after"])
        assert all(map(math.isfinite, rank["losses"]))
        # Ranks see different data, and clipping is at work on all of it.
        assert rank["losses"] != found[rank is found[0]]["losses"]
        assert rank["norms"] == found[0]["norms"]
        assert min(rank["norms"]) > CLIP
    for name in found[0]["experts"]:
        assert len({rank["after"][name] for rank in found}) == run.ep


@on_ranks(2, 4)
def test_clipping_by_ones_own_norm_would_show(ranks):
    assert replicated_that_differ(results(ranks, Run(ep=2, stage=0, steps=3, broken="clip"))) != []


@on_ranks(4)
def test_a_missing_reduction_of_experts_would_show(ranks):
    assert experts_that_differ_between_peers(results(ranks, Run(ep=2, stage=0, steps=3, broken="reduction"))) != []


@on_ranks(*((2, run) for run in RUNS[2] if run.starved and run.ep == 2))
def test_a_rank_without_tokens_trains_like_one_process_with_all_experts(ranks, run):
    found = results(ranks, run)
    whole = results(ranks, replace(run, ep=1, stage=0))
    for rank, expected in zip(found, whole, strict=True):
        assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert rank["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        moved = {name for name in rank["experts"] if rank["before"][name] != rank["after"][name]}
        assert moved == (rank["experts"] if rank["ep_rank"] == 0 else set())


@on_ranks(2, 4)
def test_initial_weights_do_not_depend_on_sharding_or_backend(ranks):
    models = []
    for how in ranks[0]["initial"]:
        found: dict[Any, str] = {}
        for rank in ranks:
            for key, bits in rank["initial"][how].items():
                assert found.setdefault(key, bits) == bits, f"{key} differs between the ranks of {how}"
        models.append(found)
    assert all(found == models[0] for found in models)
    experts = [bits for key, bits in models[0].items() if isinstance(key, tuple)]
    assert len(experts) == len(set(experts)) == 3 * 8 * 3


@on_ranks(2)
def test_an_optimizer_that_mixes_experts_with_others_is_refused_on_every_rank(ranks):
    for rank in ranks:
        assert rank["refusal"].startswith("optimizer = 'SGD': experts need groups of their own")
