"""`megatron-tied patch`: expert tying in files that are not ours."""

from __future__ import annotations

import argparse

from megatron_tied.cli.patch_source import add_options, patch_source
from megatron_tied.errors import ConfigError, Problem


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds `patch`."""
    told = "add expert tying to the sources of Megatron-LM, or take it out"
    parser = subparsers.add_parser("patch", help=told, description=told)
    add_options(parser)
    parser.set_defaults(run=_patch)


def _patch(args: argparse.Namespace) -> int:
    if args.megatron_lm is None:
        raise ConfigError(Problem("--megatron-lm", None, "must be the root of a Megatron-LM tree"))
    return patch_source(args)
