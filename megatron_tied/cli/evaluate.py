"""`megatron-tied evaluate`: loss and perplexity on held-out data, for each domain."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megatron_tied.bad_input import tell_once
from megatron_tied.cli.json_file import check_place, write_json
from megatron_tied.cli.options import Subparsers, count
from megatron_tied.errors import ConfigError, Problem

_FAILED, _INTERRUPTED = 1, 130
_DESCRIPTION = """\
Loss and perplexity of a checkpoint on held-out data, for each domain. Every token after the first of a data set is
predicted once, in sequences that follow each other as in training; experts take every token, whatever their capacity.
On several processes: deepspeed --module megatron_tied.evaluate ..., or torchrun -m megatron_tied.evaluate ...
"""


def add_parser(subparsers: Subparsers) -> None:
    """Adds `evaluate`."""
    told = "loss and perplexity on held-out data, for each domain"
    parser = subparsers.add_parser("evaluate", help=told, description=_DESCRIPTION)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="or a run, whose latest checkpoint is meant"
    )
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="PREFIX", help="data sets that prepare-data made; or NAME=PREFIX"
    )
    parser.add_argument("--seq-length", type=count, metavar="N", help="default: that of the training")
    parser.add_argument("--micro-batch-size", type=count, default=4, metavar="N", help="of a process; default: 4")
    parser.add_argument("--max-tokens", type=count, metavar="N", help="predicted of each domain; default: all")
    parser.add_argument(
        "--expert-model-parallel-size",
        type=count,
        default=1,
        metavar="N",
        help="processes that share the experts, where they fit into none alone; default: 1",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures in full")
    # The deepspeed launcher adds it; the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    try:
        return _evaluate(args)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except ConfigError as error:
        if "RANK" not in os.environ:
            raise
        return tell_once(error)


def _evaluate(args: argparse.Namespace) -> int:
    from megatron_tied.training.launcher import check_launcher

    check_launcher()
    check_place(args.json)
    from megatron_tied.checkpoint.together import RankError
    from megatron_tied.cli.console import console
    from megatron_tied.evaluate.domains import read_domains
    from megatron_tied.evaluate.held_out import held_out_losses
    from megatron_tied.evaluate.report import as_json, report
    from megatron_tied.inference.loading import find_model

    found = find_model(args.checkpoint)
    domains = read_domains(args.data, found, max_tokens=args.max_tokens)
    _check_experts(args.expert_model_parallel_size, found.config.num_moe_experts, found.tie.num_tied_experts)
    seq_length = args.seq_length or found.seq_length
    try:
        losses = held_out_losses(
            found,
            domains,
            seq_length=seq_length,
            micro_batch_size=args.micro_batch_size,
            is_launched="RANK" in os.environ,
            expert_model_parallel_size=args.expert_model_parallel_size,
        )
    except RankError as error:
        print(f"error: {found.path} cannot be loaded: {error}", file=sys.stderr)
        return _FAILED
    if os.environ.get("RANK", "0") != "0":  # the first tells it
        return 0
    content = as_json(found, domains, losses, seq_length=seq_length)
    is_written = args.json is None or write_json(args.json, content)
    console().print(report(content, tokenizer_is_known=found.tokenizer is not None))
    return 0 if is_written else _FAILED


def _check_experts(size: int, experts: int, tied_experts: int | None) -> None:
    processes = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    for what, number in (("processes", processes), ("experts", experts), ("experts of a tied bank", tied_experts)):
        if number is not None and number % size:
            valid = f"must divide the number of {what}, {number}"
            raise ConfigError(Problem("--expert-model-parallel-size", size, valid))
