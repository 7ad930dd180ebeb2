"""Every global batch stands for itself: the routers' bias and their global loss forget the batch before."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter

from megatron_tied import initialize, parameter_groups
from megatron_tied.engine.router_state import RouterState
from tests.tiny_model import build, inputs, loss

RATE = 0.25
BIASED = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": RATE,
}

pytestmark = pytest.mark.usefixtures("launched")


def routers(model: torch.nn.Module) -> list[TopKRouter]:
    return [module for module in model.modules() if isinstance(module, TopKRouter)]


def test_a_bias_moves_against_the_load_of_each_batch_alone() -> None:
    model = build(**BIASED)
    state = RouterState(model)
    # The second batch is the smaller one: with the first still counted, its moves would be those of the first again.
    first = torch.tensor([80.0, 0, 0, 0, 0, 0, 0, 0])
    second = torch.tensor([0.0, 8, 0, 0, 0, 0, 0, 0])
    expected = torch.zeros(8)
    for counts in (first, second):
        for router in routers(model):
            router.local_tokens_per_expert += counts
        state.finish_global_batch()
        expected += RATE * torch.sign(counts.mean() - counts)
        for router in routers(model):
            torch.testing.assert_close(router.expert_bias, expected)


def test_the_global_loss_of_a_batch_does_not_depend_on_the_batch_before() -> None:
    model = build(moe_router_load_balancing_type="global_aux_loss", moe_aux_loss_coeff=1.0, moe_z_loss_coeff=None)
    state = RouterState(model)

    def router_gradients(seed: int) -> list[torch.Tensor]:
        model.zero_grad()
        loss(model, inputs(seed=seed)).backward()
        state.finish_global_batch()
        return [router.weight.grad.clone() for router in routers(model)]

    alone = router_gradients(seed=1)
    router_gradients(seed=2)
    for after_another, gradient in zip(router_gradients(seed=1), alone, strict=True):
        torch.testing.assert_close(after_another, gradient)


def test_within_a_batch_the_global_loss_remembers() -> None:
    model = build(moe_router_load_balancing_type="global_aux_loss", moe_aux_loss_coeff=1.0, moe_z_loss_coeff=None)
    steps = []
    for seed in (1, 2):
        loss(model, inputs(seed=seed)).backward()
        steps.append([router.ga_steps.item() for router in routers(model)])
    assert steps == [[1] * 6, [2] * 6]


def test_biases_and_counts_stay_float32_in_a_bf16_engine() -> None:
    model = build(precision="bf16", **BIASED)
    bias = torch.linspace(0.1, 1.0, 8)
    for router in routers(model):
        router.expert_bias.copy_(bias)
        # What bf16 would round to 1024 again and again.
        router.local_tokens_per_expert.fill_(1025)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    engine = initialize(model, config, optimizer=torch.optim.SGD(parameter_groups(model, lr=0.1), lr=0.1))[0]
    for router in routers(engine.module):
        assert router.weight.dtype == torch.bfloat16
        assert torch.equal(router.expert_bias, bias)
        assert router.local_tokens_per_expert.tolist() == [1025.0] * 8
