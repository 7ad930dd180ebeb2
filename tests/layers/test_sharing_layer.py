"""Attention and routers of a tie group: one set of Parameters in modules of each layer's own, whatever is done."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_tied.layers.banks import is_tied, tie
from megatron_tied.layers.sharing_layer import sharing_layers
from megatron_tied.models.initialization import initialize_weights
from megatron_tied.training.summary import parameter_figures
from tests.tiny_model import TIE, build, gradients, inputs, loss, model_config

pytestmark = pytest.mark.usefixtures("one_process")

ATTENTION, ALL = (dataclasses.replace(TIE, share=share) for share in ("experts_attention", "all"))
SHARED = {ATTENTION: ("self_attention.",), ALL: ("self_attention.", "mlp.router.")}
OWNERS = (0, 1, 1, 1, 4, 4)


def owners(model: torch.nn.Module, part: str) -> list[int]:
    """For each layer, the first with the very same Parameters in its module `part`."""
    weights = [tuple(map(id, layer.get_submodule(part).parameters())) for layer in model.decoder.layers]
    return [weights.index(of_layer) for of_layer in weights]


@pytest.mark.parametrize("share", [ATTENTION, ALL], ids=["attention", "all"])
def test_what_is_shared_is_listed_under_the_owner_and_the_rest_is_each_layers_own(share):
    model = build(share)
    layers = model.decoder.layers
    assert tuple(owners(model, "self_attention")) == OWNERS
    assert owners(model, "mlp.router") == (list(OWNERS) if share is ALL else list(range(6)))
    assert owners(model, "input_layernorm") == owners(model, "pre_mlp_layernorm") == list(range(6))
    assert len({id(module) for layer in layers for module in (layer.self_attention, layer.mlp.router)}) == 12
    assert [layer.self_attention.layer_number for layer in layers] == [1, 2, 3, 4, 5, 6]
    listed = {name for name, _ in model.named_parameters()}
    expected = {name for name, _ in build().named_parameters()}
    assert listed == {
        name
        for name in expected
        if not name.startswith("decoder.layers.")
        or int(name.split(".")[2]) in OWNERS
        or not name.split(".", 3)[3].startswith(SHARED[share])
    }


def test_nothing_changes_where_experts_alone_are_shared():
    assert {type(layer) for layer in build().decoder.layers} == {TransformerLayer}


@pytest.mark.parametrize("share", [ATTENTION, ALL], ids=["attention", "all"])
def test_the_shared_gradient_is_the_sum_of_what_the_layers_would_have(share):
    model, apart = build(share), build()
    apart.load_state_dict({name: value for name, value in model.state_dict().items() if value is not None})
    losses = [loss(each, inputs()) for each in (model, apart)]
    assert losses[0].item() == losses[1].item()
    for each in losses:
        each.backward()
    expected = gradients(apart)
    for layer, owner in enumerate(OWNERS):
        for name in [name for name in expected if name.startswith(f"decoder.layers.{layer}.") and layer != owner]:
            rest = name.split(".", 3)[3]
            if rest.startswith(SHARED[share]):
                of_owner = f"decoder.layers.{owner}.{rest}"
                expected[of_owner] = expected[of_owner] + expected.pop(name)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-5, atol=1e-7)


def test_losses_of_a_shared_router_are_tracked_by_layer():
    tracker = get_moe_layer_wise_logging_tracker()
    found = []
    for model in (build(ALL), build()):
        tracker.clear()
        model.load_state_dict({name: value for name, value in build(ALL).state_dict().items() if value is not None})
        loss(model, inputs())
        found.append({name: entry["values"].clone() for name, entry in tracker.items()})
    tracker.clear()
    assert found[0]
    assert all(values.count_nonzero() == 6 for values in found[0].values())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_leaving_the_meta_device_and_casts_keep_it_shared():
    with torch.device("meta"):
        model = build(ALL)
    model.to_empty(device="cpu")
    for weight in model.parameters():
        torch.nn.init.ones_(weight)
    initialize_weights(model, model.config, seed=1)
    expected = dict(build(ALL).named_parameters())
    assert all(torch.equal(weight, expected[name]) for name, weight in model.named_parameters())
    model.bfloat16()
    for part in ("self_attention", "mlp.router"):
        assert tuple(owners(model, part)) == OWNERS
    for layer in sharing_layers(model):
        layer.check_tied()


def test_a_replaced_parameter_is_found():
    model = build(ATTENTION)
    projection = model.decoder.layers[3].self_attention.linear_proj
    projection.weight = torch.nn.Parameter(projection.weight.detach().clone())
    *_, replaced, fifth, sixth = sharing_layers(model)
    fifth.check_tied()
    sixth.check_tied()
    with pytest.raises(RuntimeError, match=r"layer 3 no longer shares .* expert bank 1 \(layers 1, 2, 3\)"):
        replaced.check_tied()


def test_the_input_norm_in_transformer_engines_projection_stays_the_layers_own():
    def attention() -> torch.nn.Module:
        projection = torch.nn.Linear(2, 2, bias=False)
        projection.layer_norm_weight = torch.nn.Parameter(torch.ones(2))
        return torch.nn.ModuleDict({"linear_qkv": projection})

    owner, follower = attention(), attention()
    tie(follower, owner)
    assert follower.linear_qkv.weight is owner.linear_qkv.weight
    assert follower.linear_qkv.layer_norm_weight is not owner.linear_qkv.layer_norm_weight
    assert is_tied(follower, owner)


@pytest.mark.parametrize("share", [TIE, ATTENTION, ALL], ids=["experts", "attention", "all"])
def test_figures_count_what_is_shared_once(share):
    model = build(share)
    figures = parameter_figures(model, model_config().topology(share))
    assert figures["unique"] == sum(weight.numel() for weight in model.parameters())
    untied = build(dataclasses.replace(TIE, banks=(0, 1, 2, 3, 4, 5)))
    assert figures["untied"] == sum(weight.numel() for weight in untied.parameters())
