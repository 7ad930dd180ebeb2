"""The parts of the training loop that a whole run does not show: their order, masks, and what is not timed."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_tied import TieConfig, parameter_groups
from megatron_tied.engine.parameter_groups import AdamWGroups
from megatron_tied.monitor.step_time import StepTime
from megatron_tied.training import window as window_module
from megatron_tied.training.config_file import parse_config
from megatron_tied.training.evaluation import LossFunction, evaluate
from megatron_tied.training.loop import train_step
from megatron_tied.training.window import Window, rates_of
from tests.tiny_model import FIELDS, build


class Engine:
    """Notes what is called; the loss per token is the token itself."""

    def __init__(self, accumulation: int = 1):
        self.calls: list[str] = []
        self.accumulation = accumulation
        self.module = SimpleNamespace(
            config=SimpleNamespace(moe_router_load_balancing_type="none", moe_aux_loss_coeff=0.0, moe_z_loss_coeff=None)
        )

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> Any:
        self.calls.append("forward")
        self.seen = (positions, mask, labels)
        return (tokens * torch.ones((), requires_grad=torch.is_grad_enabled())).to(torch.bfloat16)

    def gradient_accumulation_steps(self) -> int:
        return self.accumulation

    def get_global_grad_norm(self) -> float:
        return 1.0

    def backward(self, loss: torch.Tensor) -> None:
        assert loss.requires_grad
        self.calls.append("backward")

    def fp16_enabled(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return lambda: self.calls.append(name)


class Watcher:
    """Stands for the monitoring: notes what it is told of a step."""

    def __init__(self, calls: list[str]):
        self.calls = calls

    def phase(self, name: str) -> AbstractContextManager[None]:
        self.calls.append(name)
        return nullcontext()

    def forward(self) -> AbstractContextManager[None]:
        return self.phase("forward")

    def before_update(self) -> None:
        self.calls.append("before update")


def batch(tokens: list[float], mask: list[float]) -> dict[str, torch.Tensor]:
    values = torch.tensor([tokens])
    return {
        "tokens": values,
        "labels": values + 1,
        "position_ids": torch.arange(len(tokens))[None],
        "loss_mask": torch.tensor([mask]),
    }


LOSS = LossFunction(torch.device("cpu"))


def test_loss_is_the_mean_over_tokens_that_count():
    engine = Engine()
    loss = LOSS(engine, batch([1.0, 5.0, 9.0], [1.0, 0.0, 1.0]))
    assert (loss.item(), loss.dtype) == (5.0, torch.float32)
    positions, mask, labels = engine.seen
    assert positions.tolist() == [[0, 1, 2]]
    assert labels.tolist() == [[2.0, 6.0, 10.0]]
    # Each attention module knows its own.
    assert mask is None


def test_a_step_is_its_micro_batches_in_order():
    engine = Engine(accumulation=3)
    losses = iter([batch([value] * 3, [1.0] * 3) for value in (1.0, 2.0, 6.0, 100.0)])
    loss = train_step(engine, LOSS, losses, Watcher(engine.calls))
    parts = ["data", "forward", "forward", "backward", "backward"]
    rest = [*parts, "optimizer", "step"]
    assert engine.calls == [*rest, *rest, *parts, "before update", "optimizer", "step"]
    assert loss.item() == 3.0
    assert not loss.requires_grad
    assert next(losses)["tokens"][0, 0] == 100.0


@pytest.mark.usefixtures("one_process")
def test_evaluation_takes_no_gradients_and_goes_back_to_training():
    engine = Engine()
    batches = [batch([value] * 3, [1.0] * 3) for value in (1.0, 4.0)]
    assert evaluate(engine, LOSS, batches) == 2.5
    assert engine.calls == ["eval", "forward", "forward", "train"]


@pytest.mark.usefixtures("one_process")
def test_speed_counts_training_alone(monkeypatch: pytest.MonkeyPatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(window_module.time, "perf_counter", lambda: clock.now)
    config = parse_config(
        {
            "model": {"preset": "quickstart"},
            "data": {"train": "corpus"},
            "train": {"run_dir": "run", "seq_length": 50, "global_batch_size": 4},
        }
    )
    monkeypatch.setattr(window_module, "state_bytes", lambda engine: 3 * 10**9)
    window = Window(config, Engine(), {"planned_states_gb": 2.5}, StepTime())
    for seconds in (3.0, 5.0):
        clock.now += seconds
        window.add(torch.tensor(seconds), {"lr": 2 / seconds, "lr/experts_lr_div_2": 1 / seconds})
    metrics = window.close(2, {})
    assert (metrics["lm_loss"], metrics["loss"], metrics["tokens"]) == (4.0, 4.0, 400)
    assert metrics["perplexity"] == pytest.approx(math.exp(4.0))
    assert (metrics["step_seconds"], metrics["tokens_per_second"]) == (4.0, 50.0)
    assert metrics["eta_seconds"] == 998 * 4.0
    assert metrics["time/other"] == 4.0
    assert metrics["memory_fullest_gb"] == pytest.approx(metrics["memory_gb"])
    assert (metrics["lr"], metrics["lr/experts_lr_div_2"]) == (0.4, 0.2)
    assert (metrics["states_gb"], metrics["planned_states_gb"]) == (3.0, 2.5)

    with window.paused():
        clock.now += 60.0
    clock.now += 2.0
    window.add(torch.tensor(1.0), {"lr": 0.5})
    metrics = window.close(3, {})
    assert (metrics["lm_loss"], metrics["tokens"], metrics["step_seconds"]) == (1.0, 600, 2.0)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("share", ["experts", "all"])
@pytest.mark.parametrize("is_muon", [True, False])
def test_the_learning_rate_of_a_model_all_of_whose_layers_are_tied(share: str, is_muon: bool) -> None:
    layers = FIELDS["num_layers"]
    model = build(TieConfig(group_size=layers, skip_first=0, skip_last=0, share=share))
    beside = AdamWGroups(lr=3.0, weight_decay=0.0) if is_muon else None
    rates = rates_of(parameter_groups(model, lr=1.0, beside_muon=beside))
    assert rates["lr"] == pytest.approx(1.0)
    assert rates[f"lr/experts_lr_div_{layers**0.5:.4g}"] == pytest.approx(layers**-0.5)
    assert rates.get("lr/adamw") == (3.0 if is_muon else None)
    assert ("lr/dense" in rates) == (share == "experts" or not is_muon)
