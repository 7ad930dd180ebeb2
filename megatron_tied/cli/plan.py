"""`megatron-tied plan`: memory, traffic and speed of a run before anyone rents a machine."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tied.cli.options import Subparsers, count, positive
from megatron_tied.errors import ConfigError, Problem

if TYPE_CHECKING:
    from megatron_tied.planner.layout import Layout
    from megatron_tied.planner.plan import Plan, Subject
    from megatron_tied.topology import TieConfig
    from megatron_tied.training.config import RunConfig

_GROUP_SIZES = (1, 2, 4)
_MOST_RANKS = 1_000_000
# What a plan without a config file is about.
_SEQ_LENGTH, _SEQUENCES = 4096, 1024


def add_parser(subparsers: Subparsers) -> None:
    """Adds `plan`."""
    told = "memory, traffic and speed of a run on machines that need not be here"
    parser = subparsers.add_parser("plan", help=told, description=told)
    parser.add_argument("--config", type=Path, help="the YAML file of a run")
    parser.add_argument("--arch", help="a model preset, in place of the config's model section")
    parser.add_argument("--scale", help="the preset's size")
    parser.add_argument("--world-size", type=_ranks, required=True, metavar="N", help="how many ranks (GPUs)")
    parser.add_argument(
        "--hardware", default="h100", metavar="NAME", help="h100 (default), h200, b200, a100, cpu, or FILE:NAME"
    )
    parser.add_argument(
        "--gpu-memory", type=positive, metavar="GB", help="memory per rank, 10^9 bytes; default: the hardware's"
    )
    parser.add_argument("--imbalance", type=_at_least_one, help="tokens of the busiest rank over the mean")
    parser.add_argument("--search", action="store_true", help="try EP, ZeRO, micro-batch, group size and recompute")
    parser.add_argument("--group-sizes", default=_GROUP_SIZES, type=_counts, metavar="1,2,4", help="to search")
    parser.add_argument("--top", type=count, default=10, help="how many layouts of a search are shown")
    parser.add_argument("--json", action="store_true", help="everything, in bytes and seconds")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="replace single values")
    parser.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> int:
    # With pydantic and OmegaConf behind them they are not for those who ask for help.
    from megatron_tied.planner.hardware import load_hardware
    from megatron_tied.training.planning import planned_layout, planned_subject, remarks

    hardware = load_hardware(args.hardware)
    if args.gpu_memory is not None:
        hardware = hardware.model_copy(update={"memory_gb": args.gpu_memory})
    config = _config(args)
    planned_only = remarks(config, args.world_size)
    assumed = {} if args.imbalance is None else {"imbalance": args.imbalance}
    layout = planned_layout(config, args.world_size, **assumed)
    subject = planned_subject(config, hardware)
    show = _searched if args.search else _side_by_side
    told = show(args, subject, config.tie, layout)
    if args.json:
        print(json.dumps({**told, "planned_only": list(map(str, planned_only))}, indent=2))
        return 0
    for problem in planned_only:
        print(f"planned only, this version cannot train it: {problem}")
    if config.offloads_to_nvme():
        print("offload to nvme is planned like offload to cpu: its bytes stand under host, disks are not timed")
    return 0


def _searched(args: argparse.Namespace, subject: Subject, tie: TieConfig, layout: Layout) -> dict[str, object]:
    """The best layouts: for JSON, and shown unless that is asked for."""
    from megatron_tied.cli.console import console
    from megatron_tied.planner.report import found_table, resting_on
    from megatron_tied.planner.search import search

    found = search(subject, tie, layout, args.group_sizes)
    if not args.json:
        console().print(found_table(found, args.top), *map(resting_on, found.fitting[:1]), sep="\n")
    plans = [plan.to_json() for plan in found.fitting[: args.top]]
    return {"considered": found.considered, "fitting": len(found.fitting), "plans": plans}


def _side_by_side(args: argparse.Namespace, subject: Subject, tie: TieConfig, layout: Layout) -> dict[str, object]:
    """The asked-for layout, tied and untied: for JSON, and shown unless that is asked for."""
    from megatron_tied.cli.console import console
    from megatron_tied.planner.advice import changes
    from megatron_tied.planner.report import comparison, resting_on, verdict

    named = _compared(subject, tie, layout)
    if not args.json:
        name, plan = named[0] if _is_untied(subject, tie) else named[1]
        advice = changes(subject, tie, plan)
        console().print(comparison(named), verdict(name, plan, advice), resting_on(plan), sep="\n\n")
    return {"plans": {name: plan.to_json() for name, plan in named}}


def _config(args: argparse.Namespace) -> RunConfig:
    from megatron_tied.training.config_file import load_config

    sections: dict[str, dict[str, object]] = {}
    if args.arch is not None:
        sections["model"] = {"preset": args.arch, **({"scale": args.scale} if args.scale else {})}
    elif args.scale is not None:
        raise ConfigError(Problem("--scale", args.scale, "must come with --arch"))
    if args.config is None:
        if args.arch is None:
            raise ConfigError(Problem("--config", None, "must be given, or else --arch"))
        # As many sequences as come near to the usual, and divide over any number of ranks.
        batch = args.world_size * max(1, round(_SEQUENCES / args.world_size))
        train = {"run_dir": "planned", "seq_length": _SEQ_LENGTH, "global_batch_size": batch}
        sections |= {"data": {"train": "planned"}, "train": train}
    return load_config(args.config, args.overrides, sections)


def _compared(subject: Subject, tie: TieConfig, layout: Layout) -> list[tuple[str, Plan]]:
    """Untied beside the configured tie groups; without any, beside those that one would try first."""
    untied = tie.untied()
    named = [("untied", subject.plan(untied, layout))]
    if any(bank.is_tied for bank in subject.topology(tie).banks):
        name = f"tied, g={tie.group_size}" if tie.banks is None else "tied by tie.banks"
        return [*named, (name, subject.plan(tie, layout))]
    if not _is_untied(subject, tie):
        return [*named, (f"untied, {tie.num_tied_experts} experts in the middle", subject.plan(tie, layout))]
    for group_size in _GROUP_SIZES[1:]:
        try:
            named.append((f"tied, g={group_size}", subject.plan(replace(untied, group_size=group_size), layout)))
        except ConfigError:
            continue  # too few layers for such groups
    return named


def _is_untied(subject: Subject, tie: TieConfig) -> bool:
    """Whether every layer has a bank of its own, as wide as all others."""
    topology, experts = subject.topology(tie), subject.model.num_moe_experts
    return not any(bank.is_tied or topology.num_experts(bank, experts) != experts for bank in topology.banks)


def _ranks(text: str) -> int:
    ranks = count(text)
    if ranks > _MOST_RANKS:
        raise argparse.ArgumentTypeError(f"{text!r} must be at most {_MOST_RANKS:,}")
    return ranks


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(count, text.split(",")))


def _at_least_one(text: str) -> float:
    value = positive(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be at least 1: the busiest has no less than the mean")
    return value
