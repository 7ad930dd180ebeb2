"""Megatron-Core's routing options with tied experts: expert parallelism changes nothing, and biases follow the load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launch import launch

RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SIGMOID = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.05,
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.0,
}
OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
OFFLOAD_3 = {
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
}
# Name -> (what is added to the model, what to the ds_config).
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "aux_loss": ({}, {}),
    "seq_aux_loss": ({"moe_router_load_balancing_type": "seq_aux_loss"}, {}),
    "global_aux_loss": ({"moe_router_load_balancing_type": "global_aux_loss"}, {}),
    "two aux losses": (
        {"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"], "moe_aux_loss_coeff": [0.02, 0.01]},
        {},
    ),
    "expert bias": (SIGMOID, {}),
    "expert bias, recompute, ZeRO 3": (SIGMOID | RECOMPUTE, {"zero_optimization": {"stage": 3}}),
    "group-limited": ({**SIGMOID, "moe_router_num_groups": 4, "moe_router_group_topk": 2}, {}),
    "shared experts": ({"moe_shared_expert_intermediate_size": 16}, {"zero_optimization": {"stage": 3}}),
    "gated shared experts": (
        {"moe_shared_expert_intermediate_size": 16, "moe_shared_expert_gate": True},
        {"zero_optimization": {"stage": 2}},
    ),
    "capacity with drop": ({"moe_expert_capacity_factor": 1.0}, {}),
    "capacity with drop and pad": (
        {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
        {},
    ),
    "router in fp32": ({"moe_router_dtype": "fp32"}, {}),
    "offload of optimizer states": ({}, OFFLOAD),
    "offload of states and parameters": ({}, OFFLOAD_3),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("semantics")
    job_file, result_file = directory / "job", directory / "result"
    generator = torch.Generator().manual_seed(0)
    # A global batch of 8 sequences: 2 ranks x 2 micro-batches x 2.
    batches = torch.randint(0, 64, (3, 8, 17), generator=generator)
    torch.save({"variants": VARIANTS, "batches": batches}, job_file)
    launch("tests.distributed.semantics_worker", 2, str(job_file), str(result_file))
    return torch.load(Path(result_file), weights_only=False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_expert_parallelism_changes_nothing(variant: str, results: dict[str, list[dict[str, Any]]]) -> None:
    one, two = results[variant]
    for figures, expected in zip(two["figures"], one["figures"], strict=True):
        assert figures == pytest.approx(expected, rel=1e-5)
    for name, expected in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], expected, rtol=1e-5, atol=1e-6, msg=f"{variant}: {name}")
    assert one["biases"].keys() == two["biases"].keys()
    assert all(torch.equal(two["biases"][name], bias) for name, bias in one["biases"].items())


@pytest.mark.parametrize("variant", ["offload of optimizer states", "offload of states and parameters"])
def test_offload_changes_nothing(variant: str, results: dict[str, list[dict[str, Any]]]) -> None:
    for name, expected in results["aux_loss"][0]["weights"].items():
        torch.testing.assert_close(results[variant][1]["weights"][name], expected, rtol=1e-5, atol=1e-6, msg=name)


def test_recompute_counts_tokens_once(results: dict[str, list[dict[str, Any]]]) -> None:
    plain, recomputed = results["expert bias"][1], results["expert bias, recompute, ZeRO 3"][1]
    for name, bias in plain["biases"].items():
        assert torch.equal(recomputed["biases"][name], bias), name


def test_expert_bias_moves_by_its_rate_in_every_layer(results: dict[str, list[dict[str, Any]]]) -> None:
    biases = results["expert bias"][1]["biases"]
    assert len(biases) == 5
    rate, steps = SIGMOID["moe_router_bias_update_rate"], 3
    for name, bias in biases.items():
        moves = bias / rate
        torch.testing.assert_close(moves, moves.round(), msg=name)
        assert moves.abs().max() <= steps, name
        assert moves.abs().sum() > 0, name
    assert len({tuple(bias.tolist()) for bias in biases.values()}) > 1, "every layer has a bias of its own"
