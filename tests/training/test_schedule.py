"""The learning rate over a run, against its closed form."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_tied.training.optimizer_config import OptimizerConfig
from megatron_tied.training.schedule import go_to, lr_factor, lr_schedule


def test_warm_up_is_linear_and_reaches_the_peak_in_its_last_step():
    optimizer = OptimizerConfig(lr=1.0, warmup_steps=4)
    assert [lr_factor(step, 100, optimizer) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_between_peak_and_floor():
    optimizer = OptimizerConfig(lr=1.0, min_lr=0.2, warmup_steps=2)
    middle = 2 + (10 - 2) // 2
    assert lr_factor(middle, 10, optimizer) == pytest.approx((1 + 0.2) / 2)
    quarter = 2 + (10 - 2) // 4
    assert lr_factor(quarter, 10, optimizer) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)


def test_last_step_is_one_before_the_floor():
    optimizer = OptimizerConfig(lr=2.0, min_lr=0.5)
    assert 0.25 < lr_factor(9, 10, optimizer) == pytest.approx(0.25 + 0.75 * (1 + math.cos(0.9 * math.pi)) / 2)
    for step in (10, 11, 1000):
        assert lr_factor(step, 10, optimizer) == pytest.approx(0.25)


def test_a_constant_rate():
    optimizer = OptimizerConfig(lr=0.3, min_lr=0.3)
    assert {lr_factor(step, 7, optimizer) for step in range(9)} == {1.0}


def test_a_rate_that_stays_at_its_peak():
    optimizer = OptimizerConfig(lr=0.3, warmup_steps=2, schedule="constant")
    assert [lr_factor(step, 7, optimizer) for step in range(9)] == [0.5, *[1.0] * 8]


def test_a_line_from_peak_to_floor():
    optimizer = OptimizerConfig(lr=1.0, min_lr=0.2, warmup_steps=2, schedule="linear")
    found = [lr_factor(step, 10, optimizer) for step in range(12)]
    assert found == pytest.approx([0.5, 1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.2])


def test_warm_up_then_stable_then_decay():
    optimizer = OptimizerConfig(lr=1.0, min_lr=0.2, warmup_steps=2, schedule="wsd", decay_steps=4)
    found = [lr_factor(step, 10, optimizer) for step in range(11)]
    assert found == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


@given(steps=st.integers(1, 400), data=st.data(), lr=st.floats(1e-6, 1.0), floor=st.floats(0, 1))
def test_rises_then_falls_and_no_step_is_wasted(steps: int, data: st.DataObject, lr: float, floor: float):
    warmup = data.draw(st.integers(0, steps))
    optimizer = OptimizerConfig(lr=lr, min_lr=lr * floor, warmup_steps=warmup)
    factors = [lr_factor(step, steps, optimizer) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[:warmup] == sorted(set(factors[:warmup]))
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    assert all(factor >= floor * (1 - 1e-9) for factor in factors[warmup:])
    assert max(factors) == 1.0


def test_groups_keep_their_ratio():
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    groups = [{"params": [weight], "lr": lr} for weight, lr in zip(weights, (8.0, 4.0, 1.0), strict=True)]
    optimizer = torch.optim.SGD(groups)
    config = OptimizerConfig(lr=8.0, min_lr=2.0, warmup_steps=2)
    schedule = lr_schedule(optimizer, 6, config)
    for step in range(6):
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([lr * lr_factor(step, 6, config) for lr in (8.0, 4.0, 1.0)])
        other = torch.optim.SGD([{"params": [weights[0]], "lr": 8.0}, {"params": [weights[1]], "lr": 4.0}])
        go_to(lr_schedule(other, 6, config), step)
        # The very bits of a schedule that was stepped there.
        assert [group["lr"] for group in other.param_groups] == rates[:2]
        optimizer.step()
        schedule.step()
