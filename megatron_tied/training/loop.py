"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_tied.data.datasets import Datasets
from megatron_tied.data.sampler import GlobalBatchSampler, train_loader
from megatron_tied.engine.engine import TiedMoEEngine
from megatron_tied.monitor.sinks import Sinks
from megatron_tied.platform import device
from megatron_tied.training.config import RunConfig
from megatron_tied.training.evaluation import Batch, LossFunction, evaluate
from megatron_tied.training.guards import check_consistency, check_step, loss_scale_floor
from megatron_tied.training.progress import Progress
from megatron_tied.training.window import Window


def train(config: RunConfig, engine: TiedMoEEngine, datasets: Datasets, sinks: Sinks) -> dict[str, Any]:
    """Run all steps, with logging and evaluation; returns the last value of every metric."""
    settings = config.train
    loss_function = LossFunction(settings.seq_length, device())
    window = Window(config, engine)
    latest: dict[str, Any] = {}

    def log(step: int, metrics: dict[str, float]) -> None:
        sinks.write(step, metrics)
        latest.update(metrics)

    batches = iter(_loader(config, datasets.train, settings.steps))
    with Progress(settings.steps, enabled=torch.distributed.get_rank() == 0) as progress:
        for step in range(1, settings.steps + 1):
            learning_rates = {group["label"]: group["lr"] for group in engine.optimizer.param_groups}
            with loss_scale_floor(step):
                window.add(train_step(engine, loss_function, batches))
            progress.advance()
            if skipped := check_step(engine, step, settings):
                progress.say(skipped)
            check_consistency(engine, step, settings)
            if step % settings.log_every == 0 or step == settings.steps:
                log(step, window.close(step, learning_rates))
                progress.report(step, latest)
            if _is_evaluation_step(config, datasets, step):
                began = time.perf_counter()
                held_out = _loader(config, datasets.validation, settings.eval_steps)
                loss = evaluate(engine, loss_function, held_out)
                window.pause(time.perf_counter() - began)
                log(step, {"validation_loss": loss})
                progress.say(f"step {step}: validation loss {loss:.4f}")
    return latest


def train_step(engine: TiedMoEEngine, loss_function: LossFunction, batches: Iterator[Batch]) -> torch.Tensor:
    """One optimizer step over its micro-batches; returns their mean loss on this rank, detached."""
    losses = []
    for _ in range(engine.gradient_accumulation_steps()):
        loss = loss_function(engine, next(batches))
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return torch.stack(losses).mean()


def _is_evaluation_step(config: RunConfig, datasets: Datasets, step: int) -> bool:
    if datasets.validation is None or config.train.eval_every == 0:
        return False
    return step % config.train.eval_every == 0 or step == config.train.steps


def _loader(config: RunConfig, dataset: torch.utils.data.Dataset, steps: int) -> torch.utils.data.DataLoader:
    settings = config.train
    sampler = GlobalBatchSampler(
        num_samples=steps * settings.global_batch_size,
        consumed_samples=0,
        micro_batch_size=settings.micro_batch_size,
        global_batch_size=settings.global_batch_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
    )
    return train_loader(dataset, sampler, num_workers=config.data.num_workers)
