"""Who owns a bank, who uses it, and that they stay one whatever is done to the model."""

from __future__ import annotations

import copy

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_tied import TieConfig, tied_decoder_block_spec
from megatron_tied.layers.banks import describe, gradient_sites
from megatron_tied.layers.grouped_experts import GroupedExperts
from megatron_tied.layers.moe_layer import TiedMoELayer, tied_layers
from megatron_tied.models.gpt import transformer_config
from megatron_tied.models.initialization import initialize_weights
from tests.tiny_model import TIE, build, gradients, inputs, loss, model_config

pytestmark = pytest.mark.usefixtures("one_process")

# Not in order and not consecutive: bank 0 in layers 0 and 2, bank 1 in 1, 4 and 5, bank 2 in 3.
MIXED = TieConfig(banks=[0, 1, 0, 2, 1, 1])
BACKENDS = ["grouped", "sequential"]


def expert_storages(model: torch.nn.Module) -> list[tuple[int, ...]]:
    """Each MoE layer's expert parameters, by address."""
    return [tuple(weight.data_ptr() for weight in layer.experts.parameters()) for layer in tied_layers(model)]


def owners(model: torch.nn.Module) -> list[int]:
    """For each MoE layer, the first MoE layer with the very same expert Parameters."""
    experts = [tuple(map(id, layer.experts.parameters())) for layer in tied_layers(model)]
    return [experts.index(weights) for weights in experts]


def expert_names(names: list[str]) -> list[str]:
    return [name for name in names if ".mlp.experts." in name and "_extra_state" not in name]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bank_is_one_set_of_parameters_listed_under_its_owner(backend):
    model = build(MIXED, expert_backend=backend)
    assert owners(model) == [0, 1, 0, 3, 1, 1]
    storages = expert_storages(model)
    assert [storages.index(storage) for storage in storages] == [0, 1, 0, 3, 1, 1]
    names = expert_names([name for name, _ in model.named_parameters()])
    assert len(names) == 3 * (2 if backend == "grouped" else 2 * 8)
    assert {int(name.split(".")[2]) for name in names} == {0, 1, 3}
    assert [layer.is_owner for layer in tied_layers(model)] == [True, True, False, True, False, False]


def test_everything_but_the_bank_is_each_layers_own():
    model = build(moe_shared_expert_intermediate_size=16, moe_shared_expert_gate=True)
    layers = list(tied_layers(model))
    for part in ("router", "shared_experts"):
        own = [tuple(map(id, getattr(layer, part).parameters())) for layer in layers]
        assert len({identity for weights in own for identity in weights}) == 6 * len(own[0])
    assert len({id(layer.token_dispatcher) for layer in layers}) == 6


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_dict_has_every_layer_and_loads_into_a_model_that_stays_tied(backend):
    model, other = build(MIXED, expert_backend=backend), build(MIXED, expert_backend=backend, seed=2)
    state = model.state_dict()
    per_layer = [[n for n in expert_names(list(state)) if n.startswith(f"decoder.layers.{i}.")] for i in range(6)]
    assert {len(names) for names in per_layer} == {2 if backend == "grouped" else 16}
    for own, follower in zip(per_layer[1], per_layer[4], strict=True):
        assert state[own].data_ptr() == state[follower].data_ptr()
    other.load_state_dict(state)
    assert owners(other) == [0, 1, 0, 3, 1, 1]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cast_keeps_the_tie(backend):
    model = build(MIXED, expert_backend=backend)
    before = loss(model, inputs()).item()
    model.bfloat16()
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert owners(model) == [0, 1, 0, 3, 1, 1]
    storages = expert_storages(model)
    assert [storages.index(storage) for storage in storages] == [0, 1, 0, 3, 1, 1]
    model.float()
    assert loss(model, inputs()).item() == pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_copy_is_tied_in_itself_and_not_to_the_original(backend, monkeypatch):
    # Megatron-Core's modules hold process groups, of which there is no copy.
    monkeypatch.setattr(torch.distributed.ProcessGroup, "__deepcopy__", lambda self, memo: self, raising=False)
    model = build(MIXED, expert_backend=backend)
    twin = copy.deepcopy(model)
    assert owners(twin) == [0, 1, 0, 3, 1, 1]
    assert not {id(weight) for weight in twin.parameters()} & {id(weight) for weight in model.parameters()}
    loss(model, inputs()).backward()
    assert all(weight.grad is None for weight in twin.parameters())
    loss(twin, inputs()).backward()
    torch.testing.assert_close(gradients(twin), gradients(model), rtol=0, atol=0)
    mine, theirs = (
        {id(sites) for layer in tied_layers(m) for sites in gradient_sites(layer.experts)} for m in (model, twin)
    )
    assert not mine & theirs


@pytest.mark.parametrize("backend", BACKENDS)
def test_leaving_the_meta_device_keeps_the_tie(backend):
    with torch.device("meta"):
        model = build(MIXED, expert_backend=backend)
    assert {weight.device.type for weight in model.parameters()} == {"meta"}
    model.to_empty(device="cpu")
    assert owners(model) == [0, 1, 0, 3, 1, 1]
    for weight in model.parameters():
        torch.nn.init.ones_(weight)
    initialize_weights(model, model.config, seed=1)
    expected = dict(build(MIXED, expert_backend=backend).named_parameters())
    assert all(torch.equal(weight, expected[name]) for name, weight in model.named_parameters())
    for layer in tied_layers(model):
        layer.check_tied()


def test_a_replaced_parameter_is_found():
    model = build(MIXED)
    layers = list(tied_layers(model))
    for layer in layers:
        layer.check_tied()
    layers[4].experts.fc2_weight = torch.nn.Parameter(layers[1].experts.fc2_weight.detach().clone())
    layers[1].check_tied()
    layers[5].check_tied()
    with pytest.raises(RuntimeError, match=r"layer 4 no longer shares .* expert bank 1 \(layers 1, 4, 5\)"):
        layers[4].check_tied()


def test_every_use_site_is_counted():
    for backend, per_bank in (("grouped", 2), ("sequential", 1)):
        model = build(MIXED, expert_backend=backend)
        for layer, expected in zip(tied_layers(model), (2, 3, 2, 1, 3, 3), strict=True):
            if layer.is_owner:
                sites = gradient_sites(layer.experts)
                assert [count.use_sites for count in sites] == [expected] * per_bank
                weights = [weight for those in sites.values() for weight in those]
                assert set(map(id, weights)) == set(map(id, layer.experts.parameters()))


def untied_copy(model: torch.nn.Module, **fields: object) -> GPTModel:
    """The same model with a bank of its own for every layer, weights copied to the followers."""
    untied = build(TieConfig(), **fields)
    untied.load_state_dict({name: value.clone() for name, value in model.state_dict().items() if value is not None})
    return untied


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_the_tied_gradient_is_the_sum_of_the_untied_ones(backend, dispatcher):
    fields = {"expert_backend": backend, "moe_token_dispatcher_type": dispatcher}
    model = build(MIXED, **fields)
    untied = untied_copy(model, **fields)
    assert len(set(owners(untied))) == 6
    losses = [loss(m, inputs()) for m in (model, untied)]
    assert losses[0].item() == losses[1].item()
    for each in losses:
        each.backward()
    expected = gradients(untied)
    for layer, owner in enumerate(owners(model)):
        for name in expert_names(list(expected)):
            if owner != layer and name.startswith(f"decoder.layers.{layer}."):
                of_owner = name.replace(f"layers.{layer}.", f"layers.{owner}.")
                expected[of_owner] = expected[of_owner] + expected.pop(name)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-5, atol=1e-7)


def test_wider_tied_banks_have_wider_routers():
    tie = TieConfig(banks=[0, 1, 1, 1, 2, 2], num_tied_experts=16)
    model = build(tie)
    widths = [8, 16, 16, 16, 16, 16]
    layers = list(tied_layers(model))
    assert [layer.router.weight.shape[0] for layer in layers] == widths
    assert [layer.experts.fc1_weight.shape[0] for layer in layers] == widths
    assert [layer.token_dispatcher.num_experts for layer in layers] == widths
    assert model.config.num_moe_experts == 8
    loss(model, inputs(sequences=8)).backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())
    assert layers[1].experts.fc1_weight.grad[8:].any()


def test_the_middle_of_an_untied_model_may_be_narrower():
    model = build(TieConfig(skip_first=1, skip_last=2, num_tied_experts=4))
    layers = list(tied_layers(model))
    for widths in (
        [layer.router.weight.shape[0] for layer in layers],
        [layer.experts.fc1_weight.shape[0] for layer in layers],
        [layer.token_dispatcher.num_experts for layer in layers],
    ):
        assert widths == [8, 4, 4, 4, 8, 8]
    loss(model, inputs(sequences=8)).backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


def test_dense_layers_in_between_have_no_bank():
    model = build(TieConfig(banks=[0, 1, 1, 1]), moe_layer_freq=[0, 1, 1, 0, 1, 1])
    kinds = [isinstance(layer.mlp, TiedMoELayer) for layer in model.decoder.layers]
    assert kinds == [False, True, True, False, True, True]
    assert [layer.layer_index for layer in tied_layers(model)] == [1, 2, 4, 5]
    assert owners(model) == [0, 1, 1, 1]
    names = expert_names([name for name, _ in model.named_parameters()])
    assert {int(name.split(".")[2]) for name in names} == {1, 2}
    loss(model, inputs()).backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_models_of_one_block_spec_have_banks_of_their_own():
    settings = model_config()
    config = transformer_config(settings)
    spec = tied_decoder_block_spec(config, settings.topology(TIE), use_transformer_engine=False)
    first, second = (
        GPTModel(config=config, transformer_layer_spec=spec, vocab_size=64, max_sequence_length=0) for _ in range(2)
    )
    assert owners(first) == owners(second) == [0, 1, 1, 1, 4, 4]
    assert not {id(weight) for weight in first.parameters()} & {id(weight) for weight in second.parameters()}
    for model in (first, second):
        for layer in tied_layers(model):
            layer.check_tied()


def test_each_layer_has_an_expert_module_of_its_own():
    # A shared module would be released late by ZeRO 3.
    model = build()
    assert len({id(layer.experts) for layer in tied_layers(model)}) == 6
    assert all(isinstance(layer.experts, GroupedExperts) for layer in tied_layers(model))


def test_banks_are_named_for_people():
    topology = model_config().topology(MIXED)
    assert [describe(bank) for bank in topology.banks] == [
        "expert bank 0 (layers 0, 2)",
        "expert bank 1 (layers 1, 4, 5)",
        "expert bank 2 (layer 3)",
    ]


def test_evaluation_leaves_no_counts_behind():
    model = build()
    with torch.no_grad():
        loss(model, inputs())
    loss(model, inputs())
    loss(model, inputs()).backward()
    kept: Tensor = gradients(model)["decoder.layers.1.mlp.experts.fc1_weight"]
    model.zero_grad()
    loss(model, inputs()).backward()
    assert torch.equal(gradients(model)["decoder.layers.1.mlp.experts.fc1_weight"], kept)
    sites = [sites for layer in tied_layers(model) for sites in gradient_sites(layer.experts)]
    assert all(site.is_complete for site in sites)
