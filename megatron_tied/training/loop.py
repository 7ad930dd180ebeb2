"""The training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from megatron.core import parallel_state

from megatron_tied.data.datasets import Datasets
from megatron_tied.data.sampler import GlobalBatchSampler, train_loader
from megatron_tied.engine.engine import TiedMoEEngine
from megatron_tied.monitor.sinks import Metrics, Sinks, Tables
from megatron_tied.platform import device
from megatron_tied.training.checkpoints import Checkpoints
from megatron_tied.training.config import RunConfig
from megatron_tied.training.distillation import Distillation
from megatron_tied.training.evaluation import Batch, LossFunction, evaluate
from megatron_tied.training.guards import check_consistency, check_step, loss_scale_floor
from megatron_tied.training.liveness import Liveness
from megatron_tied.training.monitoring import Monitoring
from megatron_tied.training.plan_check import PlanCheck
from megatron_tied.training.progress import Progress
from megatron_tied.training.signals import StopSignals
from megatron_tied.training.window import Window, rates_of


@dataclass
class Trainer:
    """Takes the steps of a run, with logging, evaluation and checkpoints, to the last one or to a signal.

    The objective is that of `distillation`, if given; held-out losses are cross entropies. `latest` is the last value
    of every metric.
    """

    config: RunConfig
    engine: TiedMoEEngine
    datasets: Datasets
    distillation: Distillation | None
    monitoring: Monitoring
    window: Window
    plan: PlanCheck
    sinks: Sinks
    progress: Progress
    checkpoints: Checkpoints
    signals: StopSignals
    liveness: Liveness
    latest: dict[str, float] = field(default_factory=dict, init=False)

    def train(self, done: int) -> int:
        """Take the steps after the first `done`; returns the last one that was taken. Raises `TrainingStopped`."""
        steps = self.config.train.steps
        batches = iter(self._loader(self.datasets.train, steps, done))
        step = done
        for step in range(done + 1, steps + 1):
            self._train(step, batches)
            self._log(step)
            self._evaluate(step)
            self.checkpoints.after_step(step, self.progress.say)
            if self._is_told_to_end(step):
                break
        if step > done:
            self.checkpoints.finish(step, self.progress.say)
        return step

    def _train(self, step: int, batches: Iterator[Batch]) -> None:
        engine, settings = self.engine, self.config.train
        learning_rates = rates_of(engine.optimizer.param_groups)
        objective = self.distillation or LossFunction(device())
        with loss_scale_floor(step), self.monitoring.watching(step):
            loss = train_step(engine, objective, batches, self.monitoring)
        self.window.add(loss, learning_rates)
        self.progress.advance()
        self.liveness.step_done(step)
        if skipped := check_step(engine, step, settings):
            self.progress.say(skipped)
        check_consistency(engine, step, settings)

    def _log(self, step: int) -> None:
        """Log what was observed of this step, and the figures of all since the last log line if it is time for one."""
        settings = self.config.train
        metrics, tables = self.monitoring.finish(step)
        if step % settings.log_every == 0 or step == settings.steps:
            parts = self.distillation.take() if self.distillation else {}
            metrics = self.window.close(step, parts) | metrics
            self.progress.report(step, metrics)
            if "loss" not in self.latest:
                self.progress.say(self.plan.line(self.engine, metrics["tokens_per_second"]))
        if metrics:
            self._write(step, metrics, tables)

    def _evaluate(self, step: int) -> None:
        """Log the loss on held-out data if it is time."""
        settings, held_out = self.config.train, self.datasets.validation
        is_due = settings.eval_every and (step % settings.eval_every == 0 or step == settings.steps)
        if held_out is None or not is_due:
            return
        with self.window.paused():
            loss = evaluate(self.engine, LossFunction(device()), self._loader(held_out, settings.eval_steps))
        self._write(step, {"validation_loss": loss}, {})
        self.progress.say(f"step {step}: validation loss {loss:.4f}")

    def _write(self, step: int, metrics: Metrics, tables: Tables) -> None:
        with self.window.paused():
            self.sinks.write(step, metrics)
            if tables:
                self.sinks.write_tables(step, tables)
        self.latest |= metrics
        for alert in self.monitoring.alerts.check(step, metrics):
            self.progress.say(alert)

    def _is_told_to_end(self, step: int) -> bool:
        signal = self.signals.received()
        if signal is None:
            return False
        saves = self.config.checkpoint.save_every > 0
        then = "saving" if saves else "and nothing is saved: checkpoint.save_every is 0"
        self.progress.say(f"step {step}: received {signal}, {then}")
        return True

    def _loader(
        self, dataset: torch.utils.data.Dataset[Batch], steps: int, done: int = 0
    ) -> torch.utils.data.DataLoader[Batch]:
        settings = self.config.train
        sampler = GlobalBatchSampler(
            num_samples=steps * settings.global_batch_size,
            consumed_samples=done * settings.global_batch_size,
            micro_batch_size=settings.micro_batch_size,
            global_batch_size=settings.global_batch_size,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
        )
        return train_loader(dataset, sampler, num_workers=self.config.data.num_workers)


class Trainable(Protocol):
    """What a step asks of an engine; DeepSpeed's have it."""

    def gradient_accumulation_steps(self) -> int: ...
    def backward(self, loss: torch.Tensor) -> object: ...
    def step(self) -> object: ...


class Watch(Protocol):
    """What a step tells of itself; see `Monitoring`."""

    def forward(self) -> AbstractContextManager[None]: ...
    def phase(self, name: str) -> AbstractContextManager[None]: ...
    def before_update(self) -> None: ...


_Engine = TypeVar("_Engine", bound=Trainable)


def train_step(
    engine: _Engine, objective: Callable[[_Engine, Batch], torch.Tensor], batches: Iterator[Batch], monitoring: Watch
) -> torch.Tensor:
    """One optimizer step over its micro-batches; returns their mean loss on this rank, detached."""
    losses = []
    for left in reversed(range(engine.gradient_accumulation_steps())):
        with monitoring.phase("data"):
            batch = next(batches)
        with monitoring.forward():
            loss = objective(engine, batch)
        with monitoring.phase("backward"):
            engine.backward(loss)
        if left == 0:
            monitoring.before_update()
        with monitoring.phase("optimizer"):
            engine.step()
        losses.append(loss.detach())
    return torch.stack(losses).mean()
