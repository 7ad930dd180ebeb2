"""Optimizer groups: every parameter once, with the decay and the learning rate that are its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megatron_tied import ConfigError, TieConfig, initialize_model_parallel, parameter_groups
from megatron_tied.engine.groups import expert_group_name, is_expert_parallel, mark_expert_parameters
from megatron_tied.engine.parameter_groups import AdamWGroups
from megatron_tied.layers.moe_layer import tied_layers
from tests.tiny_model import TIE, build

pytestmark = pytest.mark.usefixtures("one_process")


def names(model: torch.nn.Module, group: dict[str, Any]) -> set[str]:
    found = {id(weight): name for name, weight in model.named_parameters()}
    return {found[id(weight)] for weight in group["params"]}


def by_label(model: torch.nn.Module, **options: Any) -> dict[str, dict[str, Any]]:
    groups = parameter_groups(model, **{"lr": 1.0, **options})
    assert len({group["label"] for group in groups}) == len(groups)
    return {group["label"]: group for group in groups}


@pytest.mark.parametrize("fields", [{}, {"expert_backend": "sequential", "add_bias_linear": True}], ids=str)
def test_every_trainable_parameter_is_in_one_group(fields):
    model = build(**fields)
    model.embedding.requires_grad_(False)
    grouped = [id(weight) for group in parameter_groups(model, lr=1.0) for weight in group["params"]]
    assert sorted(grouped) == sorted(id(weight) for weight in model.parameters() if weight.requires_grad)


def test_groups_of_the_tiny_model():
    model = build()
    groups = by_label(model, lr=1.0, weight_decay=0.1)
    assert {label: (group["lr"], group["lr_divisor"], group["weight_decay"]) for label, group in groups.items()} == {
        "dense": (1.0, 1.0, 0.1),
        "dense_no_decay": (1.0, 1.0, 0.0),
        "experts": (1.0, 1.0, 0.1),
        "experts_lr_div_1.732": (pytest.approx(3**-0.5), pytest.approx(3**0.5), 0.1),
        "experts_lr_div_1.414": (pytest.approx(2**-0.5), pytest.approx(2**0.5), 0.1),
    }
    for label, owner in (("experts", 0), ("experts_lr_div_1.732", 1), ("experts_lr_div_1.414", 4)):
        prefix = f"decoder.layers.{owner}.mlp.experts."
        assert names(model, groups[label]) == {f"{prefix}fc1_weight", f"{prefix}fc2_weight"}
    assert "decoder.layers.1.mlp.router.weight" in names(model, groups["dense"])
    assert "decoder.layers.1.input_layernorm.weight" in names(model, groups["dense_no_decay"])


@pytest.mark.parametrize("rule", ["sqrt", "linear", "none", 3, 2.5])
def test_the_divisor_follows_the_banks_actual_size(rule):
    # Three middle layers in runs of two: one tied pair and a remainder that is untied.
    model = build(TieConfig(group_size=2, skip_first=1, skip_last=2, lr_divisor=rule))
    divisors = {name: g["lr_divisor"] for g in parameter_groups(model, lr=1.0) for name in names(model, g)}
    of_owner = {n: divisors[f"decoder.layers.{n}.mlp.experts.fc1_weight"] for n in (0, 1, 3, 4, 5)}
    tied = {"sqrt": 2**0.5, "linear": 2.0, "none": 1.0}.get(rule, rule)
    assert of_owner == {0: 1.0, 1: pytest.approx(tied), 3: 1.0, 4: 1.0, 5: 1.0}
    assert {divisor for name, divisor in divisors.items() if ".experts." not in name} == {1.0}


@pytest.mark.parametrize("beside_muon", [None, AdamWGroups(1.0, 0.1)], ids=["adamw", "muon"])
@pytest.mark.parametrize("share", ["experts_attention", "all"])
def test_a_shared_attentions_matrices_are_divided_and_neither_norms_nor_routers(share, beside_muon):
    model = build(dataclasses.replace(TIE, share=share), add_qkv_bias=True)
    divided: dict[str, float] = {}
    for group in parameter_groups(model, lr=1.0, beside_muon=beside_muon):
        assert group["lr"] == pytest.approx(1 / group["lr_divisor"])
        divided |= {name: group["lr_divisor"] ** 2 for name in names(model, group) if group["lr_divisor"] != 1.0}
    assert divided == {
        f"decoder.layers.{owner}.{name}": pytest.approx(size)
        for owner, size in ((1, 3), (4, 2))
        for name in (
            *("mlp.experts.fc1_weight", "mlp.experts.fc2_weight"),
            *("self_attention.linear_qkv.weight", "self_attention.linear_proj.weight"),
        )
    }


def test_no_vector_decays_not_even_an_experts_bias():
    model = build(expert_backend="sequential", add_bias_linear=True, add_qkv_bias=True)
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1)
    for group in groups:
        assert {weight.dim() > 1 for weight in group["params"]} == {group["weight_decay"] > 0}
    bias = "decoder.layers.1.mlp.experts.local_experts.0.linear_fc1.bias"
    (of_bias,) = (group for group in groups if bias in names(model, group))
    assert (of_bias["label"], of_bias["lr_divisor"]) == ("experts_lr_div_1.732_no_decay", pytest.approx(3**0.5))


def expert_parallel(model: torch.nn.Module) -> None:
    """As a rank of an expert parallel run sees its layers."""
    for layer in tied_layers(model):
        layer.config.expert_model_parallel_size = 2


def test_experts_of_an_expert_parallel_run_are_marked_for_deepspeed():
    model = build()
    expert_parallel(model)
    groups = parameter_groups(model, lr=1.0)
    for group in groups:
        assert {is_expert_parallel(weight) for weight in group["params"]} == {group.get("moe", False)}
        assert group["name"] == (expert_group_name() if group.get("moe") else group["label"])
    moe = {group["label"]: group["lr"] for group in groups if group.get("moe")}
    assert moe == pytest.approx({"experts": 1.0, "experts_lr_div_1.732": 3**-0.5, "experts_lr_div_1.414": 2**-0.5})
    for layer in tied_layers(model):
        for weight in layer.experts.parameters():
            assert weight.group_name == weight.ds_zero_partition_group_name == expert_group_name()


def test_the_mark_is_renewed_on_new_parameters():
    with torch.device("meta"):
        model = build()
    expert_parallel(model)
    mark_expert_parameters(model)
    # Parameters that take the place of meta ones have none of their attributes.
    model.to_empty(device="cpu")
    mark_expert_parameters(model)
    marked = {name for name, weight in model.named_parameters() if is_expert_parallel(weight)}
    assert marked == {name for name, _ in model.named_parameters() if ".experts." in name}


@pytest.mark.parametrize("size", [2, 3])
def test_an_expert_parallel_size_must_divide_the_world(size):
    with pytest.raises(ConfigError) as caught:
        initialize_model_parallel(size)
    (problem,) = caught.value.problems
    assert (problem.field, problem.value) == ("parallel.expert_model_parallel_size", size)
    assert problem.valid == "must divide the world size 1"
