"""Tensor parallelism changes nothing: against plain PyTorch, and against one rank where that has no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launch import launch
from tests.distributed.matrix import ARCHITECTURES, LIMITS, Job, material, run_cases
from tests.distributed.training_run import Case

ORACLE = {
    2: [
        Case(tp=2, stage=0),
        Case(tp=2, stage=3, recompute="full", accumulation=2),
        Case(tp=2, ep=2, stage=1, backend="sequential", dispatcher="allgather"),
    ],
    4: [
        Case(tp=2, ep=2, stage=0, accumulation=2),
        Case(tp=2, ep=2, stage=1, recompute="full"),
        Case(tp=2, ep=2, stage=2, overlap=True),
        Case(tp=2, ep=2, stage=3, recompute="full"),
        Case(tp=2, ep=4, stage=2),
        Case(tp=4, ep=2, stage=1),
        Case(tp=2, stage=3),
    ],
}
EVERY_STAGE = [
    Case(tp=2, ep=2, stage=stage, recompute=recompute, accumulation=accumulation)
    for stage in range(4)
    for recompute in ("none", "full")
    for accumulation in (1, 2)
]

OFFLOAD = {"device": "cpu"}
SHARED = {"moe_shared_expert_intermediate_size": 16}
# Name -> (what is added to the model, what to the ds_config).
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense first layer": ({"moe_layer_freq": [0, 1, 1, 1, 1], "ffn_hidden_size": 48}, {}),
    "gated shared experts": (SHARED | {"moe_shared_expert_gate": True}, {"zero_optimization": {"stage": 2}}),
    "projection norm, attention bias": (
        {"qk_layernorm": True, "qk_norm_scope": "projection", "qkv_clip": 1.0, "add_qkv_bias": True},
        {"zero_optimization": {"stage": 3}},
    ),
    "LayerNorm, head norm": ({"normalization": "LayerNorm", "qk_layernorm": True}, {}),
    "one embedding": ({"share_embeddings_and_output_weights": True}, {}),
    "seq_aux_loss": ({"moe_router_load_balancing_type": "seq_aux_loss"}, {}),
    "global_aux_loss": ({"moe_router_load_balancing_type": "global_aux_loss"}, {}),
    "expert bias": (
        {
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_bias_update_rate": 0.05,
        },
        {},
    ),
    "offload": ({}, {"zero_optimization": {"stage": 2, "offload_optimizer": OFFLOAD}}),
    "offload of states and parameters": (
        {},
        {"zero_optimization": {"stage": 3, "offload_optimizer": OFFLOAD, "offload_param": OFFLOAD}},
    ),
}


def _assert_right(job: Job, world: int, cases: list[Case]) -> None:
    for case, errors in zip(cases, run_cases(job, world, cases), strict=True):
        too_large = {name: error for name, error in errors.items() if not error <= LIMITS[name]}
        assert not too_large, f"{job}, world {world}, {case}: {too_large}"


@pytest.mark.parametrize("world", ORACLE)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_equals_plain_pytorch(arch: str, world: int) -> None:
    job = Job(arch, steps=4)
    query_groups = material(job)["spec"].num_kv_heads
    _assert_right(job, world, [case for case in ORACLE[world] if query_groups % case.tp == 0])


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_full_table(arch: str) -> None:
    _assert_right(Job(arch), 4, EVERY_STAGE)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What one rank and two tensor parallel ranks found, by variant."""
    directory = tmp_path_factory.mktemp("tensor_parallel")
    batches = torch.randint(0, 64, (3, 4, 17), generator=torch.Generator().manual_seed(0))
    torch.save({"variants": VARIANTS, "batches": batches}, directory / "job")
    found = {}
    for world in (1, 2):
        result = Path(directory, f"result_{world}")
        launch("tests.distributed.tensor_parallel_worker", world, str(directory / "job"), str(result))
        found[world] = torch.load(result, weights_only=False)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_seed_gives_the_same_model(variant: str, results: dict[int, dict[str, Any]]) -> None:
    one, two = results[1][variant], results[2][variant]
    assert one["start"].keys() == two["start"].keys()
    assert not [name for name, value in one["start"].items() if not torch.equal(two["start"][name], value)]
    assert one["parameters"] == two["parameters"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_trains_like_one_rank(variant: str, results: dict[int, dict[str, Any]]) -> None:
    one, two = results[1][variant], results[2][variant]
    for figures, expected in zip(two["steps"], one["steps"], strict=True):
        assert figures == pytest.approx(expected, rel=1e-5)
    for name, expected in one["weights"].items():
        moved = (expected - one["start"][name]).norm()
        assert (two["weights"][name] - expected).norm() <= 1e-4 * moved + 1e-6, f"{variant}: {name}"
    assert one["biases"].keys() == two["biases"].keys()
    assert all(torch.equal(two["biases"][name], bias) for name, bias in one["biases"].items())


def test_the_watchdog_compares_what_tensor_parallel_ranks_have_in_common(results: dict[int, dict[str, Any]]) -> None:
    found = results[2]["dense first layer"]
    assert found["differing"] == []
    assert found["disturbed"] == ["decoder.final_layernorm.weight"]
