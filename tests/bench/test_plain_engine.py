"""The peer's plain PyTorch loop is AdamW over each parameter once, with float32 masters of 16-bit weights."""

from __future__ import annotations

import copy

import pytest
import torch

from megatron_tied.bench.plain_engine import PlainEngine
from megatron_tied.training.optimizer_config import OptimizerConfig

pytestmark = pytest.mark.usefixtures("one_process")


class Twice(torch.nn.Module):
    """One linear map, under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(8, 8)
        self.second = self.first

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(inputs)))


def loss(model: torch.nn.Module | PlainEngine, inputs: torch.Tensor) -> torch.Tensor:
    return model(inputs).float().square().sum()


@pytest.mark.parametrize("clip_grad", [0.0, 0.5])
def test_two_micro_batches_are_one_step_of_adamw(clip_grad: float) -> None:
    # With so large an eps a step depends on how large the gradient is.
    settings = OptimizerConfig(lr=1e-2, weight_decay=0.1, clip_grad=clip_grad, eps=1.0)
    model = Twice()
    expected = copy.deepcopy(model)
    groups = [
        {"params": [expected.first.weight], "weight_decay": 0.1},
        {"params": [expected.first.bias], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)
    engine = PlainEngine(model, settings, accumulation=2)
    for _ in range(3):
        inputs = torch.randn(2, 4, 8)
        for micro_batch in inputs:
            engine.backward(loss(engine, micro_batch))
            engine.step()
        sum(loss(expected, micro_batch) / 2 for micro_batch in inputs).backward()
        if clip_grad:
            torch.nn.utils.clip_grad_norm_(expected.parameters(), clip_grad)
        adamw.step()
        adamw.zero_grad()
        torch.testing.assert_close(model.first.weight, expected.first.weight)
        torch.testing.assert_close(model.first.bias, expected.first.bias)


def test_steps_too_small_for_bf16_add_up_in_the_masters() -> None:
    model = Twice().bfloat16()
    with torch.no_grad():
        model.first.weight.fill_(1.0)
    engine = PlainEngine(model, OptimizerConfig(lr=1e-3, weight_decay=0.0), accumulation=1)
    for _ in range(20):
        engine.backward(loss(engine, torch.ones(1, 8, dtype=torch.bfloat16)))
        engine.step()
    # Each step is about lr = 0.001, and the next number below 1 is 1 - 2^-8: alone, none would get there.
    assert model.first.weight.max() < 0.99
    masters = list(engine.state_tensors())[: len(list(model.parameters()))]
    assert all(master.dtype == torch.float32 for master in masters)
    assert torch.equal(masters[0].bfloat16(), model.first.weight)
