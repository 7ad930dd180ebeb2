"""Our grouped experts and Megatron-Core's SequentialMLP: the same function of the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.experts import HAVE_TE, SequentialMLP
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_tied.errors import ConfigError
from megatron_tied.layers.backends import expert_matrices, experts_spec
from megatron_tied.layers.grouped_experts import GroupedExperts, unsupported_options
from megatron_tied.layers.initialization import initialize_experts
from megatron_tied.models.gpt import transformer_config
from tests.tiny_model import build, model_config

pytestmark = pytest.mark.usefixtures("one_process")

HIDDEN, FFN, EXPERTS = 32, 16, 4
COUNTS = [[3, 0, 5, 2], [0, 10, 0, 0], [0, 0, 0, 0]]


def config(**changes: Any) -> TransformerConfig:
    return transformer_config(model_config(num_moe_experts=EXPERTS, **changes))


def experts_of(backend: str, config: TransformerConfig, local: int = EXPERTS) -> torch.nn.Module:
    """One layer's experts; their use sites, if they count them, are one."""
    experts = build_module(experts_spec(backend), local, config, pg_collection=get_default_pg_collection())
    initialize_experts(experts, config, seed=1, bank=0, first_expert=0)
    if isinstance(experts, GroupedExperts):
        for shared in experts.shared_gradients().values():
            shared.use_sites = 1
    return experts


def run(experts: torch.nn.Module, counts: list[int]) -> dict[str, Tensor]:
    """The output for routed tokens and the gradients of tokens, probabilities and each expert's matrices."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(sum(counts), HIDDEN, generator=generator).requires_grad_()
    probs = torch.rand(sum(counts), generator=generator).requires_grad_()
    output, bias = experts(tokens, torch.tensor(counts), probs)
    assert bias is None
    (output * torch.linspace(-1, 1, HIDDEN)).square().sum().backward()
    found = {"output": output.detach(), "tokens": tokens.grad, "probs": probs.grad}
    for parameter in experts.parameters():
        parameter.data = parameter.grad
    for index, matrices in enumerate(expert_matrices(experts)):
        found |= {f"{kind} of expert {index}": matrix for kind, matrix in matrices.items()}
    return found


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_equal_weights_give_equal_outputs_and_gradients(activation, gated, counts):
    settings = config(activation=activation, gated_linear_unit=gated)
    grouped, sequential = (run(experts_of(backend, settings), counts) for backend in ("grouped", "sequential"))
    assert grouped.keys() == sequential.keys()
    assert ("gate of expert 0" in grouped) == gated
    torch.testing.assert_close(grouped, sequential, rtol=1e-5, atol=1e-7)
    for index, count in enumerate(counts):
        assert grouped[f"down of expert {index}"].any() == (count > 0)


def test_a_single_local_expert():
    settings = config()
    grouped, sequential = (run(experts_of(backend, settings, local=1), [5]) for backend in ("grouped", "sequential"))
    torch.testing.assert_close(grouped, sequential, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_recomputing_the_activation_changes_nothing(counts):
    recomputing = config(recompute_granularity="selective", recompute_modules=["moe_act"])
    found, expected = (run(experts_of("grouped", settings), counts) for settings in (recomputing, config()))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def kept_bytes(experts: torch.nn.Module) -> int:
    """What the forward pass of ten tokens keeps for backward."""
    held: list[Tensor] = []
    tokens = torch.randn(10, HIDDEN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        output, _ = experts(tokens, torch.tensor(COUNTS[0]), torch.rand(10))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    assert output.requires_grad
    return sum(storages.values())


def test_the_recomputed_activation_is_not_kept():
    recomputing = config(recompute_granularity="selective", recompute_modules=["moe_act"])
    kept, full = (kept_bytes(experts_of("grouped", settings)) for settings in (recomputing, config()))
    # At least the activation itself, [tokens, ffn] float32.
    assert kept <= full - 10 * FFN * 4


def test_bf16_keeps_its_dtype_and_comes_near():
    half, full = (
        experts_of("grouped", transformer_config(model_config(num_moe_experts=EXPERTS), precision=precision))
        for precision in ("bf16", "fp32")
    )
    tokens, probs, counts = torch.randn(10, HIDDEN), torch.rand(10), torch.tensor(COUNTS[0])
    output, _ = half(tokens.bfloat16(), counts, probs)
    assert {output.dtype, *(weight.dtype for weight in half.parameters())} == {torch.bfloat16}
    expected, _ = full(tokens, counts, probs)
    assert (output.float() - expected).norm() < 0.02 * expected.norm()


def test_parameters_are_as_documented():
    gated, plain = (experts_of("grouped", config(gated_linear_unit=gated)) for gated in (True, False))
    assert {name: tuple(weight.shape) for name, weight in gated.named_parameters()} == {
        "fc1_weight": (EXPERTS, 2 * FFN, HIDDEN),
        "fc2_weight": (EXPERTS, HIDDEN, FFN),
    }
    assert plain.fc1_weight.shape == (EXPERTS, FFN, HIDDEN)
    assert gated.fc1_weight.allreduce


def test_expert_parallel_weights_carry_megatrons_mark():
    settings = config()
    settings.expert_model_parallel_size = 2
    assert not any(weight.allreduce for weight in experts_of("grouped", settings).parameters())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("add_bias_linear", True),
        ("fp8", "e4m3"),
        ("fp4", "e2m1"),
        ("moe_latent_size", 8),
        ("moe_apply_probs_on_input", True),
        ("activation_func_clamp_value", 7.0),
    ],
)
def test_what_only_megatrons_experts_implement_is_refused_by_name(name, value):
    settings = config()
    assert hasattr(settings, name)
    assert unsupported_options(settings) == []
    setattr(settings, name, value)
    with pytest.raises(ConfigError) as caught:
        GroupedExperts(EXPERTS, settings, get_default_pg_collection())
    assert [(problem.field, problem.value) for problem in caught.value.problems] == [(f"model.{name}", value)]


def test_a_refused_option_is_told_before_the_model_is_built():
    with pytest.raises(ConfigError, match=r"^model\.activation_func_clamp_value = 7\.0: is not supported"):
        build(activation_func_clamp_value=7.0)


@pytest.mark.parametrize("backend", ["grouped", "sequential"])
def test_matrices_are_views_that_write_into_the_bank(backend):
    experts = experts_of(backend, config())
    for index, matrices in enumerate(expert_matrices(experts)):
        for place, kind in enumerate(("gate", "up", "down")):
            matrices[kind].fill_(10 * index + place)
    found = [{kind: matrix.unique().tolist() for kind, matrix in m.items()} for m in expert_matrices(experts)]
    assert found == [{"gate": [10.0 * i], "up": [10.0 * i + 1], "down": [10.0 * i + 2]} for i in range(EXPERTS)]
    if backend == "grouped":
        assert experts.fc1_weight[2, :FFN].unique().item() == 20, "gate rows come first"


def test_an_unknown_kind_of_experts_is_refused():
    with pytest.raises(TypeError, match="Linear"):
        expert_matrices(torch.nn.Linear(2, 2))


def test_backends_are_chosen_by_name():
    assert experts_spec("grouped") is GroupedExperts
    assert experts_spec("sequential").module is SequentialMLP
    with pytest.raises(ConfigError, match=r"model\.expert_backend = 'fast': must be one of grouped, sequential, te"):
        experts_spec("fast")


@pytest.mark.skipif(HAVE_TE, reason="Transformer Engine is installed")
def test_transformer_engine_is_asked_for_only_where_it_is():
    with pytest.raises(ConfigError, match="needs Transformer Engine"):
        experts_spec("te")
