"""One training run, from a checked config to `summary.json`."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from megatron_tied.checkpoint.layout import Layout, model_layout
from megatron_tied.data.datasets import Datasets, build_datasets
from megatron_tied.engine.engine import TiedMoEEngine
from megatron_tied.engine.groups import initialize_model_parallel
from megatron_tied.engine.initialize import initialize
from megatron_tied.models.gpt import build_gpt_model
from megatron_tied.monitor.dead_experts import LastUse
from megatron_tied.monitor.description import RunDescription
from megatron_tied.monitor.sinks import JsonLinesSink, Sink, Sinks, forget_metrics_after
from megatron_tied.monitor.tensorboard import TensorBoardSink
from megatron_tied.monitor.wandb import WandbSink
from megatron_tied.run_directory import METRICS, SUMMARY
from megatron_tied.training.checkpoints import Checkpoints
from megatron_tied.training.config import RunConfig
from megatron_tied.training.distillation import Distillation, load_teacher
from megatron_tied.training.freezing import freeze
from megatron_tied.training.liveness import Liveness
from megatron_tied.training.loop import Trainer
from megatron_tied.training.monitoring import Monitoring
from megatron_tied.training.optimizer import build_optimizer
from megatron_tied.training.plan_check import PlanCheck
from megatron_tied.training.progress import Progress
from megatron_tied.training.resume import Start
from megatron_tied.training.run_lock import RunLock
from megatron_tied.training.schedule import lr_schedule
from megatron_tied.training.signals import StopSignals
from megatron_tied.training.startup import check_model, join_processes, prepare_run, split_argument
from megatron_tied.training.state import RunState
from megatron_tied.training.summary import overall, parameter_figures, write_summary
from megatron_tied.training.window import Window


def run(config: RunConfig) -> None:
    """Train as `config` says; its own problems must be checked. Raises `ConfigError` on every rank alike."""
    join_processes()
    try:
        with (
            Liveness(config.train.liveness_timeout, Path(config.train.run_dir)) as liveness,
            StopSignals() as signals,
            RunLock(Path(config.train.run_dir)) as lock,
        ):
            config, start = prepare_run(config, lock)
            parallel = config.parallel
            initialize_model_parallel(parallel.expert_model_parallel_size, parallel.tensor_model_parallel_size)
            check_model(config)
            _say(_introduction(config))
            for remark in start.remarks:
                _say(remark)
            _run(config, start, liveness, signals)
    finally:
        torch.distributed.destroy_process_group()


def _run(config: RunConfig, start: Start, liveness: Liveness, signals: StopSignals) -> None:
    started = time.monotonic()
    liveness.step_done(start.step)
    with liveness.patience():
        datasets = _datasets(config)
    teacher = load_teacher(config, start.teacher) if start.teacher is not None else None
    engine, layout, figures = build_engine(config)
    last_use = LastUse(config.monitor.every)
    state = RunState(config, engine, layout, last_use)
    if start.checkpoint is not None:
        state.restore(start.checkpoint)
    elif start.weights is not None:
        state.begin_with_weights_of(start.weights)
    _say(f"{config.topology().describe()}; {figures['unique']:,} parameters, untied {figures['untied']:,}")
    # Of their own: the one is used while a save in the background uses the other.
    for_signals, for_saving = (torch.distributed.new_group(backend="gloo") for _ in range(2))
    is_first = torch.distributed.get_rank() == 0
    earlier = _forget_later(config, start) if is_first else {}
    signals.tell_all(for_signals)
    plan = PlanCheck(config, torch.distributed.get_world_size())
    constants = {"parameters_unique": figures["unique"], "parameters_untied": figures["untied"], **plan.metrics}
    monitoring = Monitoring(config, engine, last_use)
    with (
        _sinks(config, figures, start.step) as sinks,
        Checkpoints(config, state, for_saving) as checkpoints,
        Progress(config.train.steps, first=start.step, enabled=is_first) as progress,
    ):
        trainer = Trainer(
            config,
            engine,
            datasets,
            distillation=Distillation(config, teacher, engine.module) if teacher is not None else None,
            monitoring=monitoring,
            window=Window(config, engine, constants, monitoring.step_time),
            plan=plan,
            sinks=sinks,
            progress=progress,
            checkpoints=checkpoints,
            signals=signals,
            liveness=liveness,
        )
        step = trainer.train(start.step)
    seconds = time.monotonic() - started
    if step < config.train.steps:
        way_on = "to go on, start it again (train.resume: auto)"
        then = way_on if config.checkpoint.save_every else "nothing is saved: started again it begins anew"
        _say(f"stopped after step {step} of {config.train.steps}; {then}")
    elif is_first:
        _finish(config, figures, seconds, earlier | trainer.latest)
    # All end together: who ends early is taken for lost, with its host.
    torch.distributed.barrier(for_signals)
    # Its hooks hold it, with all its process groups, for the life of the process.
    engine.destroy()


def _forget_later(config: RunConfig, start: Start) -> dict[str, float | None]:
    """Forget what the run has logged after `start`, a summary too; returns the last values left."""
    directory = Path(config.train.run_dir)
    if start.step < config.train.steps:
        (directory / SUMMARY).unlink(missing_ok=True)  # of a shorter run that goes on here
    return forget_metrics_after(start.step, directory / METRICS)


def _finish(config: RunConfig, figures: dict[str, int], seconds: float, metrics: Mapping[str, float | None]) -> None:
    summary = {
        "steps": config.train.steps,
        "parameters": figures,
        "topology": config.topology().describe(),
        "world_size": torch.distributed.get_world_size(),
        "seconds": round(seconds, 1),
        **overall(metrics),
    }
    path = Path(config.train.run_dir) / SUMMARY
    write_summary(path, summary)
    _say(f"finished in {seconds:.0f} s: {path}")


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
        with suppress(OSError):  # a full disk or a terminal that is gone ends no run
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


def build_engine(config: RunConfig) -> tuple[TiedMoEEngine, Layout, dict[str, int]]:
    """The engine of a run at step 0, where its parameters stand in a checkpoint, and their figures."""
    settings = config.optimizer
    ds_config = config.deepspeed_config(torch.distributed.get_world_size())
    model = build_gpt_model(config.model, config.tie, seed=config.train.seed, precision=config.train.precision)
    figures = parameter_figures(model, config.topology())
    freeze(model, config.frozen())
    layout = model_layout(model, zero_stage=ds_config["zero_optimization"]["stage"])
    optimizer = build_optimizer(model, settings)
    schedule = lr_schedule(optimizer, config.train.steps, settings)
    engine, *_ = initialize(model, ds_config, optimizer=optimizer, lr_scheduler=schedule)
    return engine, layout, figures


def _sinks(config: RunConfig, figures: dict[str, int], done: int) -> Sinks:
    if torch.distributed.get_rank() != 0:
        return Sinks()
    directory, settings = Path(config.train.run_dir), config.monitor
    world_size = torch.distributed.get_world_size()
    description = RunDescription(config.model_dump(mode="json"), config.topology(), figures, world_size)
    sinks: list[Sink] = [JsonLinesSink(directory / METRICS)]
    if settings.tensorboard:
        sinks.append(TensorBoardSink(config.tensorboard_directory(), description, done))
    if settings.wandb is not None:
        sinks.append(WandbSink(settings.wandb.model_dump(), directory, description, done))
    return Sinks(*sinks)
