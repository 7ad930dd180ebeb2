"""`megatron-tied lm-eval`: the command of lm-evaluation-harness, which knows our checkpoints if started like this."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec

from megatron_tied.cli.options import Subparsers
from megatron_tied.errors import ConfigError, Problem


def add_parser(subparsers: Subparsers) -> None:
    """Adds `lm-eval`, all of whose arguments, --help too, are the harness's."""
    told = "lm-evaluation-harness, with --model megatron-tied --model_args checkpoint=DIR"
    # Its options begin with a dash, too: here no argument is an option.
    parser = subparsers.add_parser("lm-eval", help=told, prefix_chars="\0", add_help=False)
    parser.add_argument("arguments", nargs="*")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if find_spec("lm_eval") is None:
        valid = "must be installed: pip install 'megatron-tied[eval]'"
        raise ConfigError(Problem("lm-eval", None, valid))
    # It looks for no plugins: a model must have been registered before.
    from lm_eval.__main__ import cli_evaluate

    from megatron_tied.evaluate import harness  # noqa: F401

    sys.argv = ["megatron-tied lm-eval", *args.arguments]
    cli_evaluate()
    return 0
