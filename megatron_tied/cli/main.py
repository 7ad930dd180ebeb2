"""The `megatron-tied` command."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from megatron_tied import __version__
from megatron_tied.bad_input import BAD_INPUT, tell
from megatron_tied.cli import (
    bench,
    checkpoint,
    convert,
    doctor,
    evaluate,
    generate,
    lm_eval,
    patch,
    plan,
    prepare_data,
    report,
    supervise,
)
from megatron_tied.cli.terminable import Terminated, terminable
from megatron_tied.errors import ConfigError

_COMMANDS = (
    prepare_data,
    plan,
    patch,
    convert,
    checkpoint,
    report,
    evaluate,
    generate,
    lm_eval,
    bench,
    doctor,
    supervise,
)
_INTERRUPTED, _UNREAD, _TERMINATED = (128 + number for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGTERM))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns the exit code: 2 for bad input, which is told on stderr, 130 after Ctrl-C.

    143 after SIGTERM, 141 where nobody reads what it prints, as of a program that SIGPIPE ends.
    """
    try:
        with terminable():
            code = _run(argv)
        print(end="", flush=True)  # also where there is no standard output
    except ConfigError as error:
        tell(error, sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except Terminated:
        print("terminated", file=sys.stderr)
        return _TERMINATED
    except BrokenPipeError:  # nobody reads on, and nothing is to be written at the exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _UNREAD
    return code


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="megatron-tied",
        description="Pretraining of Mixture-of-Experts models whose layers share experts.",
        epilog="To train: deepspeed --module megatron_tied.pretrain --config FILE [section.field=value ...]",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(subparsers)
    args, rest = parser.parse_known_args(argv)
    # argparse takes overrides in one run only; people write them between options, too.
    if rest and not (hasattr(args, "overrides") and all("=" in item and item[0] != "-" for item in rest)):
        subparsers.choices[args.command].error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    code: int = args.run(args)
    return code


if __name__ == "__main__":
    sys.exit(main())
