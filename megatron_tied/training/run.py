"""One training run, from a checked config to `summary.json`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from megatron_tied.data.datasets import Datasets, build_datasets
from megatron_tied.engine.engine import TiedMoEEngine
from megatron_tied.engine.groups import initialize_model_parallel
from megatron_tied.engine.initialize import initialize
from megatron_tied.engine.parameter_groups import parameter_groups
from megatron_tied.models.gpt import build_gpt_model
from megatron_tied.monitor.sinks import JsonLinesSink, Sinks, TensorBoardSink
from megatron_tied.training.config import RunConfig
from megatron_tied.training.loop import train
from megatron_tied.training.schedule import lr_schedule
from megatron_tied.training.startup import check_model, join_processes, prepare_run, split_argument
from megatron_tied.training.summary import parameter_figures, write_summary


def run(config: RunConfig) -> None:
    """Train as `config` says; its own problems must be checked. Raises `ConfigError` on every rank alike."""
    join_processes()
    try:
        config = prepare_run(config)
        parallel = config.parallel
        initialize_model_parallel(parallel.expert_model_parallel_size, parallel.tensor_model_parallel_size)
        check_model(config)
        _say(_introduction(config))
        _run(config)
    finally:
        torch.distributed.destroy_process_group()


def _run(config: RunConfig) -> None:
    started = time.monotonic()
    directory = Path(config.train.run_dir)
    datasets = _datasets(config)
    engine, figures = _engine(config)
    _say(f"{config.topology().describe()}; {figures['unique']:,} parameters, untied {figures['untied']:,}")
    with _sinks(config, directory) as sinks:
        results = train(config, engine, datasets, sinks)
    if torch.distributed.get_rank() == 0:
        summary = {
            "steps": config.train.steps,
            "parameters": figures,
            "topology": config.topology().describe(),
            "world_size": torch.distributed.get_world_size(),
            "seconds": round(time.monotonic() - started, 1),
            **results,
        }
        write_summary(directory / "summary.json", summary)
    _say(f"finished in {time.monotonic() - started:.0f} s: {directory / 'summary.json'}")


def _introduction(config: RunConfig) -> str:
    train, world_size = config.train, torch.distributed.get_world_size()
    stage = config.deepspeed_config(world_size)["zero_optimization"]["stage"]
    parallel = f"expert parallel {config.parallel.expert_model_parallel_size}"
    if (size := config.parallel.tensor_model_parallel_size) > 1:
        parallel += f", tensor parallel {size}"
    return (
        f"{train.run_dir}: {train.steps:,} steps of {train.global_batch_size:,} x {train.seq_length:,} tokens; "
        f"processes {world_size}, {parallel}, ZeRO {stage}, {train.precision}"
    )


def _say(line: str) -> None:
    if torch.distributed.get_rank() == 0:
        print(line, file=sys.stderr, flush=True)


def _datasets(config: RunConfig) -> Datasets:
    train, data = config.train, config.data
    return build_datasets(
        train=data.train,
        validation=data.validation,
        split=split_argument(config),
        cache_dir=data.cache_dir,
        seq_length=train.seq_length,
        train_samples=train.steps * train.global_batch_size,
        # Every evaluation reads the same samples, so that its losses compare.
        validation_samples=train.eval_steps * train.global_batch_size if train.eval_every else 0,
        seed=train.seed,
    )


def _engine(config: RunConfig) -> tuple[TiedMoEEngine, dict[str, int]]:
    settings = config.optimizer
    model = build_gpt_model(config.model, config.tie, seed=config.train.seed, precision=config.train.precision)
    figures = parameter_figures(model, config.topology())
    groups = parameter_groups(model, lr=settings.lr, weight_decay=settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)
    schedule = lr_schedule(optimizer, config.train.steps, settings)
    ds_config = config.deepspeed_config(torch.distributed.get_world_size())
    engine, *_ = initialize(model, ds_config, optimizer=optimizer, lr_scheduler=schedule)
    return engine, figures


def _sinks(config: RunConfig, directory: Path) -> Sinks:
    if torch.distributed.get_rank() != 0:
        return Sinks()
    sinks = [JsonLinesSink(directory / "metrics.jsonl")]
    if config.monitor.tensorboard:
        sinks.append(TensorBoardSink(directory / "tensorboard"))
    return Sinks(*sinks)
