"""Where a run begins: at step 0, with the weights of another, or after the newest sound checkpoint. All ranks agree."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_tied.checkpoint.directory import CheckpointDirectory, resolve
from megatron_tied.checkpoint.loader import Checkpoint, newest_sound, on_rank_0, verified
from megatron_tied.checkpoint.manifest import BrokenCheckpointError
from megatron_tied.errors import ConfigError, Problem
from megatron_tied.run_directory import CHECKPOINTS, METRICS, SUMMARY
from megatron_tied.training.compatibility import (
    config_of,
    objective_changes,
    resume_problems,
    same_model_problems,
    teacher_problems,
)
from megatron_tied.training.config import RunConfig


@dataclass(frozen=True)
class Start:
    """`checkpoint` to go on from, or else `weights` to begin with, or neither; `remarks` are lines to show.

    `teacher` is what the run learns from, whichever way it begins.
    """

    checkpoint: Checkpoint | None = None
    weights: Checkpoint | None = None
    teacher: Checkpoint | None = None
    remarks: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The last step that is done."""
        return self.checkpoint.manifest.step if self.checkpoint else 0


def checkpoint_directory(config: RunConfig) -> CheckpointDirectory:
    """Where the run keeps its checkpoints."""
    return CheckpointDirectory(Path(config.train.run_dir, CHECKPOINTS))


def choose_start(config: RunConfig) -> Start:
    """Follow `train.resume`, `train.init_from` and `distill.teacher`; a collective.

    It may read whole checkpoints for their checksums. Raises `ConfigError` on every rank, naming what is broken or does
    not fit, and what could be taken instead.
    """
    try:
        start = _chosen(config)
    except BrokenCheckpointError as error:
        raise ConfigError(Problem("train.run_dir", config.train.run_dir, f"cannot be read: {error}")) from None
    if config.offloads_to_nvme() and (start.checkpoint or start.weights):
        valid = "must not offload to nvme where a run goes on from a checkpoint or begins with its weights"
        raise ConfigError(Problem("deepspeed.zero_optimization", config.deepspeed["zero_optimization"], valid))
    return _with_teacher(config, start)


def _with_teacher(config: RunConfig, start: Start) -> Start:
    if config.distill.teacher is None:
        return start
    teacher = _named(config.distill.teacher, "distill.teacher")
    if problems := list(teacher_problems(config, config_of(teacher), str(teacher.path))):
        raise ConfigError(problems)
    return replace(start, teacher=teacher, remarks=[*start.remarks, f"learns from {teacher.path}"])


def _chosen(config: RunConfig) -> Start:
    mode = config.train.resume
    if mode == "never":
        if on_rank_0(lambda: _is_used(config)):
            valid = "holds an earlier run: name a new directory, or go on with it by train.resume=auto"
            raise ConfigError(Problem("train.run_dir", config.train.run_dir, valid))
        start = Start()
    else:
        start = _automatic(config)
        # A path says where a run begins: once it has checkpoints of its own it goes on from those.
        if mode != "auto" and start.checkpoint is None:
            start = Start(_named(mode, "train.resume"), remarks=start.remarks)
    if start.checkpoint is not None:
        return _checked(config, start.checkpoint, start.remarks)
    if config.train.init_from is None:
        return start
    weights = _named(config.train.init_from, "train.init_from")
    if problems := same_model_problems(config, config_of(weights), str(weights.path)):
        raise ConfigError(problems)
    return Start(weights=weights, remarks=[*start.remarks, f"begins with the weights of {weights.path}"])


def _automatic(config: RunConfig) -> Start:
    directory = checkpoint_directory(config)
    found = newest_sound(directory)
    remarks = [f"warning: {error}" for error in found.passed_over]
    if found.checkpoint is not None:
        return Start(found.checkpoint, remarks=remarks)
    if on_rank_0(directory.steps):
        told = "; ".join(map(str, found.passed_over))
        valid = f"no checkpoint in {directory.root} is sound: {told}. Name another train.run_dir to start anew"
        raise ConfigError(Problem("train.resume", "auto", valid))
    if on_rank_0(Path(config.train.run_dir, SUMMARY).is_file):
        valid = "holds a finished run without checkpoints: name a new directory, or remove this one"
        raise ConfigError(Problem("train.run_dir", config.train.run_dir, valid))
    if on_rank_0(lambda: _has_metrics(config)):
        remarks.append(f"{config.train.run_dir} has no checkpoint: it begins again")
    return Start(remarks=remarks)


def _checked(config: RunConfig, checkpoint: Checkpoint, remarks: list[str]) -> Start:
    path, manifest = checkpoint
    if manifest.trainer.get("weights_only"):
        valid = f"{path} was converted and holds weights only: begin a run with them by train.init_from={path}"
        raise ConfigError(Problem("train.resume", config.train.resume, valid))
    saved = config_of(checkpoint)
    problems = resume_problems(config, saved, str(path))
    if problems and path.parent == checkpoint_directory(config).root:
        valid = "holds that run: a new one needs a directory of its own"
        problems.append(Problem("train.run_dir", config.train.run_dir, valid))
    if manifest.step > config.train.steps:
        valid = f"must be at least {manifest.step}, the step of {path}"
        problems.append(Problem("train.steps", config.train.steps, valid))
    if problems:
        raise ConfigError(problems)
    remarks = [*remarks, f"goes on after step {manifest.step}: {path}"]
    if saved.train.steps != config.train.steps:
        changed = f"warning: train.steps was {saved.train.steps} and is {config.train.steps}"
        remarks.append(f"{changed}: learning rates and the order of samples are those of the new length")
    return Start(checkpoint, remarks=[*remarks, *objective_changes(config, saved)])


def _named(path: str, field_name: str) -> Checkpoint:
    try:
        return verified(Path(on_rank_0(lambda: str(resolve(Path(path))))))
    except BrokenCheckpointError as error:
        offered = _offered(Path(path))
        raise ConfigError(Problem(field_name, path, f"cannot be used: {error}{offered}")) from None


def _offered(path: Path) -> str:
    """The newest sound checkpoint beside or in `path`, for a message."""
    for root in (path.parent, path, path / CHECKPOINTS):
        found = newest_sound(CheckpointDirectory(root)).checkpoint
        if found is not None:
            return f". The newest sound checkpoint there is {found.path}"
    return ""


def _is_used(config: RunConfig) -> bool:
    return _has_metrics(config) or bool(checkpoint_directory(config).steps())


def _has_metrics(config: RunConfig) -> bool:
    metrics = Path(config.train.run_dir, METRICS)
    # It is empty after a run that failed before its first step.
    return metrics.is_file() and metrics.stat().st_size > 0
