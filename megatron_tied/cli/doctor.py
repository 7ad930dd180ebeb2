"""`megatron-tied doctor`: what can be known before a long run, on this host or on all hosts of a hostfile."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tied.cli.options import Subparsers, number
from megatron_tied.errors import ConfigError, Problem

if TYPE_CHECKING:
    from megatron_tied.doctor.findings import Finding
    from megatron_tied.training.config import RunConfig

_FOUND_ERRORS, _INTERRUPTED = 1, 130
_LAUNCHER_OPTIONS = ("launcher", "master_addr", "master_port", "ssh_port")


def add_parser(subparsers: Subparsers) -> None:
    """Adds `doctor`."""
    told = "versions, ports, clocks, disks, data and network of all hosts, compared before a run"
    codes = "Exit code 0: nothing stands against the run, 1: errors found, 2: bad input."
    parser = subparsers.add_parser("doctor", help=told, description=f"{told}. {codes}")
    parser.add_argument("--hostfile", type=Path, metavar="FILE", help="of the deepspeed launcher; default: this host")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the YAML file of a run, for what it needs")
    parser.add_argument("--json", action="store_true", help="all findings, for programs")
    parser.add_argument(
        "--wait", type=_seconds, default=60.0, metavar="SECONDS", help="for hosts to come together; default: 60"
    )
    launcher = parser.add_argument_group("how hosts are reached, with a hostfile; see deepspeed --help")
    launcher.add_argument("--launcher", metavar="NAME", help="default: pdsh")
    launcher.add_argument("--master_addr", metavar="ADDRESS", help="of the first host; default: what hostname -I says")
    launcher.add_argument("--master_port", type=int, metavar="PORT", help="that the run will use; default: 29500")
    launcher.add_argument("--ssh_port", type=int, metavar="PORT")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="replace single values")
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    options = {name: value for name in _LAUNCHER_OPTIONS if (value := getattr(args, name)) is not None}
    if args.hostfile is None and options:
        raise ConfigError(Problem(f"--{next(iter(options))}", next(iter(options.values())), "needs --hostfile"))
    if args.config is None and args.overrides:
        raise ConfigError(Problem("section.field=value", args.overrides, "needs --config"))
    from megatron_tied.doctor.findings import has_errors
    from megatron_tied.training.config_file import load_config

    config = None if args.config is None else load_config(args.config, args.overrides)
    others: list[str] = []
    try:
        if args.hostfile is None:
            findings = _examine_this_host(config, args.wait)
        else:
            findings, others = _examine_hosts(args, config, options)
    except KeyboardInterrupt:
        return _INTERRUPTED
    _show(findings, as_json=args.json)
    if others:
        print("\nthe launcher's last lines:", *others, sep="\n  ", file=sys.stderr)
    return _FOUND_ERRORS if has_errors(findings) else 0


def _examine_this_host(config: RunConfig | None, patience: float) -> list[Finding]:
    from megatron_tied.training.launcher import check_launcher

    check_launcher()
    from megatron_tied.doctor.examination import examine
    from megatron_tied.doctor.meeting import Meeting, NotMet

    try:
        with Meeting(patience).world() as world:
            return list(examine(world, config))
    except NotMet as error:
        return error.findings


def _examine_hosts(
    args: argparse.Namespace, config: RunConfig | None, options: dict[str, str | int]
) -> tuple[list[Finding], list[str]]:
    from megatron_tied.doctor.hostfile import read_hostfile
    from megatron_tied.doctor.launch import examine_hosts
    from megatron_tied.doctor.request import Request

    slots = sum(read_hostfile(args.hostfile).values())
    if config is not None and (problems := config.problems(slots)):
        raise ConfigError(problems)
    request = Request(None if args.config is None else str(args.config), args.overrides, args.wait)
    return examine_hosts(args.hostfile, request, [f"--{name}={value}" for name, value in options.items()])


def _show(findings: list[Finding], *, as_json: bool) -> None:
    from megatron_tied.cli.console import console
    from megatron_tied.doctor import report

    if as_json:
        print(report.as_json(findings))
    else:
        console().print(report.report(findings))


def _seconds(text: str) -> float:
    value = number(text)
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of seconds >= 1")
    return value
