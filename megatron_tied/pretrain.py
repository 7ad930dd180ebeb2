"""Pretraining: `deepspeed --module megatron_tied.pretrain --config FILE [section.field=value ...]`.

Runs under the deepspeed launcher, torchrun, or alone as one process.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_tied.bad_input import BAD_INPUT, PATIENCE_SECONDS, tell
from megatron_tied.checkpoint.directory import how_to_go_on
from megatron_tied.errors import ConfigError, Problem, TrainingStopped
from megatron_tied.run_directory import CONFIG, METRICS
from megatron_tied.training.config import RunConfig
from megatron_tied.training.config_file import load_config
from megatron_tied.training.exits import end_workers
from megatron_tied.training.launcher import TOKEN_OPTION, TOKEN_VARIABLE, check_launcher, is_first_here

STOPPED = 1
INTERRUPTED = 130  # as shells say it


def main(argv: Sequence[str] | None = None) -> int:
    """One rank of a run; returns the exit code, the same on every rank: 2 for bad input, told once."""
    try:
        check_launcher()
        rank = int(os.environ.get("RANK", 0))
        arguments = read_arguments(sys.argv[1:] if argv is None else argv)
        if arguments.supervised:
            os.environ[TOKEN_VARIABLE] = arguments.supervised  # known by it is what this process starts, too
        config = _read_config(arguments)
    except ConfigError as error:
        # The hosts of a run may hold different files: the first rank of each tells what it found.
        return _end(error, BAD_INPUT, told_here=is_first_here())
    try:
        # Only now: what is wrong with a config is known in a second, torch and DeepSpeed take several.
        if arguments.preflight:
            from megatron_tied.doctor.preflight import preflight

            meeting = preflight(config)  # to be held until training has ended
            if meeting is None:
                return BAD_INPUT
        from megatron_tied.training.run import run

        run(config)
    except ConfigError as error:
        return _end(error, BAD_INPUT, told_here=rank == 0)
    except TrainingStopped as error:
        return _end(error, STOPPED, told_here=rank == 0)
    except KeyboardInterrupt:
        if rank == 0:
            print(f"interrupted: {config.train.run_dir} {how_to_go_on(Path(config.train.run_dir))}", file=sys.stderr)
        return INTERRUPTED
    finally:
        end_workers()
        _let_go_of_output()
    return 0


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line of a run, taken apart. Raises `ConfigError`."""
    return _parser().parse_intermixed_args(argv)


def _read_config(arguments: argparse.Namespace) -> RunConfig:
    config = load_config(arguments.config, arguments.overrides)
    problems = config.problems(int(os.environ.get("WORLD_SIZE", 1)))
    run_dir = Path(config.train.run_dir)
    resolved = run_dir / CONFIG
    if resolved.exists() and resolved.samefile(arguments.config) and not (run_dir / METRICS).exists():
        valid = f"must not hold {arguments.config} itself: a run's {CONFIG} is the resolved one, and would replace it"
        problems.append(Problem("train.run_dir", config.train.run_dir, valid))
    if problems:
        raise ConfigError(problems)
    return config


def _end(error: ConfigError | TrainingStopped, code: int, *, told_here: bool) -> int:
    if not told_here:
        time.sleep(PATIENCE_SECONDS)
    elif isinstance(error, ConfigError):
        tell(error, sys.stderr)
    else:
        print(f"error: {error}", file=sys.stderr)
    return code


def _let_go_of_output() -> None:
    """What a full disk has not taken is dropped: else Python would try again at the exit, and end with code 120."""
    try:
        sys.stderr.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """A mistake on the command line is told like any other, on one rank."""
        raise ConfigError(Problem("command line", " ".join(sys.argv[1:]), message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="megatron_tied.pretrain", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file with the run's sections")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="replace single values")
    parser.add_argument("--preflight", action="store_true", help="first do what `megatron-tied doctor` does")
    # The deepspeed launcher adds it; the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    # By which `megatron-tied supervise` knows the processes of its run.
    parser.add_argument(TOKEN_OPTION, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
