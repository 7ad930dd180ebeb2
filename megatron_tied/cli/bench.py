"""`megatron-tied bench`: tied against untied on this machine, and against other software that is installed."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tied.bad_input import tell_once
from megatron_tied.cli.json_file import check_place, write_json
from megatron_tied.cli.options import Subparsers, count
from megatron_tied.errors import ConfigError, Problem

if TYPE_CHECKING:
    from megatron_tied.bench.job import Job
    from megatron_tied.bench.results import Result

_FAILED, _INTERRUPTED = 1, 130


def add_parser(subparsers: Subparsers) -> None:
    """Adds `bench`."""
    told = "tied against untied on this machine, in turns in one run, on random tokens"
    more = "Without a config the quickstart model. Under a launcher its ranks are taken, else they are started."
    parser = subparsers.add_parser("bench", help=told, description=f"{told}. {more}")
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        metavar="FILE",
        help="the YAML file of a run; may come several times",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--ranks", type=count, metavar="N", help="default: one for each GPU, else 1")
    parser.add_argument("--rounds", type=count, default=10, metavar="N", help="turns of each contender; default: 10")
    parser.add_argument("--steps", type=count, metavar="N", help="of a turn; default: about half a second's")
    parser.add_argument(
        "--against",
        default="untied",
        metavar="NAMES",
        help="some of untied,huggingface,megatron-core,autoep; default: untied",
    )
    parser.add_argument(
        "--no-memory", action="store_true", help="on a host without GPUs: spare the runs that measure peak memory"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="replace single values")
    parser.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> int:
    try:
        return _run_all(args)
    except ConfigError as error:
        if "RANK" not in os.environ:
            raise
        return tell_once(error)


def _run_all(args: argparse.Namespace) -> int:
    from megatron_tied.bench.job import check_job, read_opponents
    from megatron_tied.bench.launch import RanksFailedError
    from megatron_tied.bench.report import report
    from megatron_tied.cli.console import console
    from megatron_tied.training.launcher import check_launcher

    check_launcher()
    opponents = read_opponents(args.against)
    check_place(args.json)
    jobs = _jobs(args, opponents)
    for job in jobs:
        check_job(job)
    results: list[Result] = []
    try:
        for job in jobs:
            result = _run(job, with_memory=not args.no_memory)
            if result is None:  # the first rank tells it
                return 0
            results.append(result)
            # After each: a later config must not cost what an earlier one has found.
            is_written = args.json is None or write_json(args.json, {"runs": results})
            console().print(report(result))
            if not is_written:
                return _FAILED
    except KeyboardInterrupt:
        return _INTERRUPTED
    except RanksFailedError as error:
        print(f"error: {error}; their last lines:", *error.lines, sep="\n  ", file=sys.stderr)
        return _FAILED
    return 0


def _jobs(args: argparse.Namespace, opponents: tuple[str, ...]) -> list[Job]:
    import torch

    from megatron_tied.bench.job import Job, load_subject

    gpus = torch.cuda.device_count()
    launched = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else None
    ranks = args.ranks or launched or max(1, gpus)
    if launched is not None and ranks != launched:
        raise ConfigError(Problem("--ranks", ranks, f"must be {launched} or left out: the launcher has started them"))
    if launched is None and 0 < gpus < ranks:
        raise ConfigError(Problem("--ranks", ranks, f"must be at most {gpus}, the number of GPUs here"))
    if launched is not None and len(args.config or ()) > 1:
        raise ConfigError(Problem("--config", list(map(str, args.config)), "must be one under a launcher"))
    precision = "bf16" if gpus else "fp32"
    return [
        Job(load_subject(path, args.overrides, ranks, precision=precision), ranks, opponents, args.rounds, args.steps)
        for path in args.config or (None,)
    ]


def _run(job: Job, *, with_memory: bool) -> Result | None:
    from megatron_tied.bench.launch import run_on_ranks, with_peaks_on_cpu
    from megatron_tied.bench.progress import progress_bar

    if "RANK" in os.environ:
        return _run_as_rank(job)
    with progress_bar(shown=True) as show:
        result = run_on_ranks(job, show)
        if with_memory and result["device"] == "cpu":
            with_peaks_on_cpu(result, job, show)
    return result


def _run_as_rank(job: Job) -> Result | None:
    """On the launcher's ranks; None on all but the first."""
    from megatron_tied.bench.measurement import measure
    from megatron_tied.bench.progress import progress_bar
    from megatron_tied.bench.ranks import is_first, together

    with progress_bar(shown=is_first()) as show, together(job.config):
        result = measure(job, show)
    return result if is_first() else None
