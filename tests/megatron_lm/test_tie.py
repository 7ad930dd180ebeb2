"""`tie_experts` on a model that Megatron-Core has built, in one process."""

from __future__ import annotations

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig

from megatron_tied import TieConfig, TiedMoELayer, TieTopology
from megatron_tied.errors import ConfigError
from megatron_tied.layers.banks import gradient_sites
from megatron_tied.layers.moe_layer import tied_layers
from megatron_tied.megatron_lm import bank_learning_rates, sum_bank_copies, tie_experts
from megatron_tied.megatron_lm.copies import BankCopy
from megatron_tied.models.gpt import transformer_config
from megatron_tied.models.spec import tie_layer_specs
from tests.tiny_model import FIELDS, build, gradients, inputs, loss, model_config

BANKS = [0, 1, 1, 1, 2, 2]


pytestmark = pytest.mark.usefixtures("one_process")


def untied_model(**changes) -> GPTModel:
    """A model whose layers are all Megatron-Core's own."""
    config = transformer_config(model_config(expert_backend="sequential", **changes))
    config.perform_initialization = True
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    block = get_gpt_decoder_block_spec(config, False, normalization="RMSNorm")
    return GPTModel(config, block, FIELDS["vocab_size"], 0, position_embedding_type="rope")


def topology(banks: list[int] = BANKS, **tie) -> TieTopology:
    return TieTopology.build(TieConfig(banks=banks, **tie), len(banks))


def test_a_built_model_keeps_the_first_layers_experts():
    model = untied_model()
    first = {layer: model.decoder.layers[layer].mlp.experts for layer in range(6)}
    weights = {layer: experts.local_experts[0].linear_fc1.weight for layer, experts in first.items()}
    before = sum(weight.numel() for weight in model.parameters())
    of_one_layer = sum(weight.numel() for weight in first[0].parameters())
    assert tie_experts([model], topology()) == [model]
    layers = list(tied_layers(model))
    assert [type(layer) for layer in layers] == [TiedMoELayer] * 6
    assert [layer.is_owner for layer in layers] == [True, True, False, False, True, False]
    for layer, bank in enumerate(BANKS):
        owner = BANKS.index(bank)
        assert layers[layer].experts.local_experts[0].linear_fc1.weight is weights[owner]
    assert before - sum(weight.numel() for weight in model.parameters()) == 3 * of_one_layer
    assert model.config.hetereogenous_dist_checkpoint


def test_gradients_are_the_sums_of_an_untied_model_with_equal_weights():
    tied, separate = untied_model(), untied_model()
    tie_experts([tied], topology())
    with torch.no_grad():
        for layer, bank in enumerate(BANKS):
            source = separate.decoder.layers[BANKS.index(bank)].mlp.experts
            separate.decoder.layers[layer].mlp.experts.load_state_dict(source.state_dict())
    batch = inputs()
    for model in (tied, separate):
        loss(model, batch).backward()
    expected: dict[str, torch.Tensor] = {}
    for name, gradient in gradients(separate).items():
        if ".experts." in name:
            layer = int(name.split(".")[2])
            name = name.replace(f"layers.{layer}.", f"layers.{BANKS.index(BANKS[layer])}.")
            expected[name] = expected.get(name, 0) + gradient
        else:
            expected[name] = gradient
    found = gradients(tied)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_a_state_without_the_followers_experts_loads_into_all_layers():
    source, model = untied_model(), untied_model()
    tie_experts([source], topology())
    tie_experts([model], topology())
    with torch.no_grad():
        for weight in source.parameters():
            weight.add_(1.0)
    followers = [f"decoder.layers.{layer}.mlp.experts." for layer in (2, 3, 5)]
    saved = {name: value for name, value in source.state_dict().items() if not name.startswith(tuple(followers))}
    model.load_state_dict(saved, strict=True)
    for name, value in source.state_dict().items():
        if value is not None and torch.is_tensor(value):
            assert torch.equal(model.state_dict()[name], value), name
    # An owner's that are missing are still told.
    del saved["decoder.layers.1.mlp.experts.local_experts.0.linear_fc1.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*layers\.1.mlp.experts.local_experts.0.linear_fc1.weight"):
        model.load_state_dict(saved, strict=True)


def test_a_distributed_state_names_a_bank_once():
    model = build(TieConfig(banks=BANKS))
    tie_experts([model], topology())
    keys = {tensor.key for tensor in model.sharded_state_dict().values() if ".experts.linear" in tensor.key}
    assert keys == {
        f"decoder.layers.{layer}.mlp.experts.experts.linear_{kind}.weight"
        for layer in (0, 1, 4)
        for kind in ("fc1", "fc2")
    }
    with pytest.raises(ConfigError, match="singleton_local_shards = True: is not supported by GroupedExperts"):
        model.sharded_state_dict(metadata={"singleton_local_shards": True})


def test_every_use_site_hands_its_gradient_on():
    # Megatron's DDP adds up by itself, and with overlap refuses a firing without a gradient.
    for backend in ("grouped", "sequential"):
        model = build(TieConfig(banks=BANKS), expert_backend=backend)
        tie_experts([model], topology())
        for layer in tied_layers(model):
            assert all(sites.use_sites == 1 for sites in gradient_sites(layer.experts))
            assert not layer.experts._forward_hooks


def test_no_use_site_writes_over_what_others_have_added():
    """Transformer Engine's rule: a module's first micro-batch overwrites `main_grad`, unless its flag is off."""

    class Linear(torch.nn.Module):
        def __init__(self, disable_parameter_transpose_cache: bool = False):
            super().__init__()
            self.disable_parameter_transpose_cache = disable_parameter_transpose_cache

    model = untied_model()
    added = []
    for layer in model.decoder.layers:
        added.append(Linear())
        layer.mlp.experts.add_module("te", added[-1])
    tie_experts([model], topology())
    # A bank of one layer keeps what speeds it up.
    assert [module.disable_parameter_transpose_cache for module in added] == [False, True, True, True, True, True]


def test_learning_rates_of_banks_and_what_tells_their_groups_apart():
    model = untied_model()
    tie_experts([model], topology())
    overrides = bank_learning_rates(OptimizerConfig(lr=6.0, min_lr=3.0), topology())
    rates = {
        weight: override
        for key, override in overrides.items()
        for name, weight in model.named_parameters()
        if key.matches(weight, name)
    }
    by_layer = {
        layer: rates.get(model.decoder.layers[layer].mlp.experts.local_experts[0].linear_fc1.weight)
        for layer in (0, 1, 4)
    }
    assert by_layer[0] is None
    for layer, size in ((1, 3), (4, 2)):
        expected = {"max_lr": 6.0 / size**0.5, "min_lr": 3.0 / size**0.5, "lr_mult": size**-0.5}
        assert by_layer[layer] == pytest.approx(expected)
    assert all(".experts." in name for name, weight in model.named_parameters() if weight in rates)


def test_experts_of_another_kind_keep_what_they_have_filled_themselves_with():
    """Megatron-Core's legacy grouped experts, which a spec may still name, are such a kind."""

    class Experts(torch.nn.Module):
        def __init__(self, num_local_experts: int, config, pg_collection=None):
            super().__init__()
            self.weight1 = torch.nn.Parameter(torch.full((num_local_experts,), 7.0))

    config = transformer_config(model_config())
    config.perform_initialization = True
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    block = get_gpt_decoder_block_spec(config, False, normalization="RMSNorm")
    block = tie_layer_specs(block, config, topology(), experts=Experts)
    model = GPTModel(config, block, FIELDS["vocab_size"], 0, position_embedding_type="rope")
    experts = [layer.experts for layer in tied_layers(model)]
    assert all(torch.equal(each.weight1, torch.full((8,), 7.0)) for each in experts)
    assert experts[1].weight1 is experts[3].weight1
    assert experts[0].weight1 is not experts[1].weight1


@pytest.mark.parametrize(
    ("banks", "tie", "changes", "message"),
    [
        ([0, 0, 0], {}, {}, "config.num_layers = 6: the topology is made for 3 layers"),
        (BANKS, {"share": "all"}, {}, "tie.share = 'all': must be experts: nothing else is shared here"),
        (BANKS, {"num_tied_experts": 16}, {}, "tie.num_tied_experts = 16: must be 8, as the layers of the model have"),
    ],
)
def test_a_topology_that_does_not_fit_is_refused(banks, tie, changes, message):
    with pytest.raises(ConfigError, match=message):
        tie_experts([untied_model(**changes)], topology(banks, **tie))


def test_moe_and_dense_layers_must_be_the_models():
    dense_first = TieTopology.build(TieConfig(banks=[0, 0, 1, 1, 2]), 6, moe_layers=range(1, 6))
    with pytest.raises(ConfigError, match=r"topology.bank_of_layer = 'None for layer 0': is an MoE layer of the model"):
        tie_experts([untied_model()], dense_first)


def test_a_model_that_was_never_tied_is_told_at_its_first_step():
    with pytest.raises(RuntimeError, match="no experts are tied in this model"):
        sum_bank_copies([untied_model()])


def test_copies_that_have_no_gradients_are_told():
    (model,) = tie_experts([untied_model()], topology())
    model.bank_copies[next(tied_layers(model))] = BankCopy(((0, 0), (1, 0)), 0, None)
    with pytest.raises(RuntimeError, match="have no gradients to sum"):
        sum_bank_copies([model])
