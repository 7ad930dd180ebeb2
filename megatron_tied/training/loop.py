"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state

from megatron_tied.data.datasets import Datasets
from megatron_tied.data.sampler import GlobalBatchSampler, train_loader
from megatron_tied.engine.engine import TiedMoEEngine
from megatron_tied.monitor.sinks import Sinks, Tables
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
from megatron_tied.training.window import Window


class Trained(NamedTuple):
    """The last step that was done, and the last value of every metric."""

    step: int
    metrics: dict[str, Any]


def train(
    config: RunConfig,
    engine: TiedMoEEngine,
    datasets: Datasets,
    sinks: Sinks,
    checkpoints: Checkpoints,
    signals: StopSignals,
    liveness: Liveness,
    monitoring: Monitoring,
    plan: PlanCheck,
    done: int = 0,
    distillation: Distillation | None = None,
) -> Trained:
    """Run the steps after the first `done`, with logging, evaluation and checkpoints, to the end or to a signal.

    The objective is that of `distillation`, if given; held-out losses are cross entropies.
    """
    settings = config.train
    loss_function = LossFunction(device())
    objective = distillation or loss_function
    window = Window(config, engine, monitoring.constants, monitoring.step_time)
    latest: dict[str, Any] = {}

    def log(step: int, metrics: dict[str, float], tables: Tables | None = None) -> None:
        began = time.perf_counter()
        sinks.write(step, metrics)
        if tables:
            sinks.write_tables(step, tables)
        window.pause(time.perf_counter() - began)
        latest.update(metrics)
        for alert in monitoring.alerts.check(step, metrics):
            progress.say(alert)

    step = done
    batches = iter(_loader(config, datasets.train, settings.steps, done))
    with Progress(settings.steps, first=done, enabled=torch.distributed.get_rank() == 0) as progress:
        for step in range(done + 1, settings.steps + 1):
            learning_rates = {group["label"]: group["lr"] for group in engine.optimizer.param_groups}
            with loss_scale_floor(step), monitoring.watching(step):
                window.add(train_step(engine, objective, batches, monitoring))
            progress.advance()
            liveness.step_done(step)
            if skipped := check_step(engine, step, settings):
                progress.say(skipped)
            check_consistency(engine, step, settings)
            metrics, tables = monitoring.finish(step)
            if step % settings.log_every == 0 or step == settings.steps:
                is_first = "loss" not in latest
                parts = distillation.take() if distillation else {}
                metrics = window.close(step, learning_rates, parts) | metrics
                progress.report(step, metrics)
                if is_first:
                    progress.say(plan.line(engine, metrics["tokens_per_second"]))
            if metrics:
                log(step, metrics, tables)
            if _is_evaluation_step(config, datasets, step):
                began = time.perf_counter()
                held_out = _loader(config, datasets.validation, settings.eval_steps)
                loss = evaluate(engine, loss_function, held_out)
                window.pause(time.perf_counter() - began)
                log(step, {"validation_loss": loss})
                progress.say(f"step {step}: validation loss {loss:.4f}")
            checkpoints.after_step(step, progress.say)
            if signal := signals.received():
                saves = config.checkpoint.save_every > 0
                then = "saving" if saves else "and nothing is saved: checkpoint.save_every is 0"
                progress.say(f"step {step}: received {signal}, {then}")
                break
        if step > done:
            checkpoints.finish(step, progress.say)
    return Trained(step, latest)


def train_step(
    engine: TiedMoEEngine, objective: LossFunction | Distillation, batches: Iterator[Batch], monitoring: Monitoring
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


def _is_evaluation_step(config: RunConfig, datasets: Datasets, step: int) -> bool:
    if datasets.validation is None or config.train.eval_every == 0:
        return False
    return step % config.train.eval_every == 0 or step == config.train.steps


def _loader(
    config: RunConfig, dataset: torch.utils.data.Dataset, steps: int, done: int = 0
) -> torch.utils.data.DataLoader:
    settings = config.train
    sampler = GlobalBatchSampler(
        num_samples=steps * settings.global_batch_size,
        consumed_samples=done * settings.global_batch_size,
        micro_batch_size=settings.micro_batch_size,
        global_batch_size=settings.global_batch_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
    )
    return train_loader(dataset, sampler, num_workers=config.data.num_workers)
