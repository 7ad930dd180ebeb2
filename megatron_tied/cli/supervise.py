"""`megatron-tied supervise`: a training run that is started again when it fails."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from megatron_tied.cli.options import Subparsers
from megatron_tied.errors import ConfigError, Problem

if TYPE_CHECKING:
    from megatron_tied.supervision.command import LaunchCommand

_ABOUT = """\
Start COMMAND, and again when it fails: after the newest checkpoint, and on the hosts of its hostfile that still answer.
More than N failures in a row without a newer checkpoint end it, as do the last step, and bad input at the first start.
Before each start what is left of the run is ended on every host, also what an earlier supervisor has left. SIGTERM and
SIGUSR1 are passed on to the ranks, which save and end; a second signal ends them at once."""
_EXAMPLE = """\
example:
  megatron-tied supervise --restarts 10 -- deepspeed --hostfile hosts --module megatron_tied.pretrain --config run.yaml
"""


def add_parser(subparsers: Subparsers) -> None:
    """Adds `supervise`."""
    parser = subparsers.add_parser(
        "supervise",
        help="start a training run, and again when it fails, on the hosts that are left",
        description=_ABOUT,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    told = "how many restarts in a row may bring no newer checkpoint"
    parser.add_argument("--restarts", metavar="N", type=int, required=True, help=told)
    told = "hosts that must answer (default: 1)"
    parser.add_argument("--min-hosts", metavar="M", type=int, default=1, help=told)
    told = "a launcher with --module megatron_tied.pretrain, after --"
    parser.add_argument("command", metavar="-- COMMAND", nargs=argparse.REMAINDER, help=told)
    parser.set_defaults(run=_supervise)


def _supervise(args: argparse.Namespace) -> int:
    # Not for those who ask for help.
    from megatron_tied.supervision.command import LaunchCommand
    from megatron_tied.supervision.supervisor import Supervisor

    command = LaunchCommand.parse(args.command[args.command[:1] == ["--"] :])
    _check(args, command)
    with Supervisor(command, args.restarts, args.min_hosts) as supervisor:
        return supervisor.run()


def _check(args: argparse.Namespace, command: LaunchCommand) -> None:
    problems = []
    if args.restarts < 0:
        problems.append(Problem("--restarts", args.restarts, "must be 0 or more"))
    most = max(1, len(command.hosts))
    if not 1 <= args.min_hosts <= most:
        problems.append(Problem("--min-hosts", args.min_hosts, f"must be 1 to {most}, the number of hosts"))
    if command.config.train.resume == "never":
        problems.append(Problem("train.resume", "never", "must be auto under supervision, to go on after a failure"))
    if not command.config.checkpoint.save_every:
        problems.append(Problem("checkpoint.save_every", 0, "must be at least 1 under supervision"))
    if problems:
        raise ConfigError(problems)
