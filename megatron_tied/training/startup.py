"""From a checked config to process groups, a run directory and sound data; all ranks agree or all stop."""

from __future__ import annotations

import json
import os
import socket
import uuid
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path

import torch

from megatron_tied.data.checks import check_data
from megatron_tied.engine.groups import start_distributed
from megatron_tied.engine.precision import precision_problem
from megatron_tied.errors import ConfigError, Problem
from megatron_tied.exchange import gather_json
from megatron_tied.files import write_whole
from megatron_tied.models.gpt import transformer_config
from megatron_tied.monitor.wandb import wandb_problem
from megatron_tied.platform.host import ranks_on_this_host, reuse_large_blocks, share_host_threads
from megatron_tied.platform.quiet import quiet_deepspeed
from megatron_tied.run_directory import CONFIG
from megatron_tied.training.config import RunConfig
from megatron_tied.training.config_file import save_config
from megatron_tied.training.deepspeed_section import refused_by_deepspeed
from megatron_tied.training.launcher import free_port
from megatron_tied.training.resume import Start, checkpoint_directory, choose_start
from megatron_tied.training.run_lock import RunLock
from megatron_tied.training.validation import to_json
from megatron_tied.training.vocabulary import vocabulary_size, with_vocabulary


def join_processes() -> None:
    """Join the other ranks; without a launcher this process is the only rank."""
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ |= alone | {"MASTER_PORT": str(free_port())}
    share_host_threads(ranks_on_this_host())
    reuse_large_blocks()
    quiet_deepspeed(int(os.environ["RANK"]))
    start_distributed()


def prepare_run(config: RunConfig, lock: RunLock) -> tuple[RunConfig, Start]:
    """Check what a run finds on this machine, choose where it begins, and make its directory, with `config.yaml`.

    `lock` is held when it returns. Returns the config, with the tokenizer's vocabulary size where it named none, and
    the start. Raises `ConfigError` on every rank, with the problems of all. A collective.
    """
    try:
        config = with_vocabulary(config)
        problems = _local_problems(config)
    except ConfigError as error:
        problems = list(error.problems)
    _agree(problems)
    _check_shared(config)
    start = choose_start(config)
    _agree(_create_run_directory(config, lock))
    _check_shared(config)
    return config, start


def check_model(config: RunConfig) -> None:
    """Raise `ConfigError` on every rank for what Megatron-Core, or some host, refuses in the model section.

    Megatron-Core's process groups must exist. A collective.
    """
    problems: list[Problem] = []
    try:
        transformer_config(config.model, precision=config.train.precision)
    except ConfigError as error:
        problems += error.problems
    except (AssertionError, NotImplementedError, TypeError, ValueError) as error:
        problems.append(Problem("model", config.model.model_extra, f"is refused by Megatron-Core: {error}"))
    _agree(problems)


def split_argument(config: RunConfig) -> str | None:
    """How the data room writes `data.split`; None where the validation data is given."""
    data = config.data
    return None if data.validation is not None else ",".join(map(str, data.split))


def _local_problems(config: RunConfig) -> list[Problem]:
    """What this rank's file system and its DeepSpeed say against the run."""
    data = config.data
    problems = check_data(
        train=data.train,
        validation=data.validation,
        split=split_argument(config),
        tokenizer=data.tokenizer,
        cache_dir=data.cache_dir,
        vocab_size=vocabulary_size(config),
        seq_length=config.train.seq_length,
        evaluates=bool(config.train.eval_every),
    )
    wandb = config.monitor.wandb
    if wandb and torch.distributed.get_rank() == 0 and (problem := wandb_problem(wandb.model_dump())):
        problems.append(problem)
    precision = config.train.precision
    if problem := precision_problem(precision, "train.precision", precision):
        problems.append(problem)
    return problems + refused_by_deepspeed(config.deepspeed)


def _agree(problems: list[Problem]) -> None:
    """Raise `ConfigError` on every rank with the problems of all, or return on every rank. A collective."""
    hosts = gather_json(socket.gethostname())
    hosts_of: dict[str, set[str]] = {}
    for host, told in zip(hosts, gather_json([to_json(astuple(problem)) for problem in problems]), strict=True):
        for problem in told:
            hosts_of.setdefault(problem, set()).add(host)
    found = []
    for problem, where in hosts_of.items():
        field, value, valid = json.loads(problem)
        suffix = "" if where == set(hosts) else f" (on {', '.join(sorted(where))})"
        found.append(Problem(field, value, valid + suffix))
    if found:
        raise ConfigError(found)


def _create_run_directory(config: RunConfig, lock: RunLock) -> list[Problem]:
    if torch.distributed.get_rank() != 0:
        return []
    directory = Path(config.train.run_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if problem := lock.take():
            return [problem]
        save_config(config, directory / CONFIG)
        if config.checkpoint.save_every:
            checkpoint_directory(config).root.mkdir(exist_ok=True)
            probe = checkpoint_directory(config).root / ".writable"
            write_whole(probe, "")
            probe.unlink()
    except OSError as error:
        return [Problem("train.run_dir", str(directory), f"must be a directory that can be written: {error}")]
    return []


def _check_shared(config: RunConfig) -> None:
    """Raise `ConfigError` on every rank if some do not see the first rank's checkpoints, where it has a place for them.

    A collective.
    """
    root, name = checkpoint_directory(config).root, None
    if torch.distributed.get_rank() == 0 and root.is_dir():
        # A name that is new: each host may have a directory of its own under the same path.
        marker = root / f".shared.{uuid.uuid4().hex}"
        with suppress(OSError):  # said when the directory is made
            marker.touch()
            name = marker.name
    name = gather_json(name)[0]
    if name is None:
        return
    valid = "must be in a file system that all ranks share: checkpoints there are not seen"
    try:
        _agree([] if (root / name).exists() else [Problem("train.run_dir", config.train.run_dir, valid)])
    finally:
        if torch.distributed.get_rank() == 0:
            (root / name).unlink(missing_ok=True)
