"""`megatron-tied patch`: expert tying in files that are not ours."""

from __future__ import annotations

import argparse

from megatron_tied.cli import patch_config, patch_source
from megatron_tied.cli.options import Subparsers
from megatron_tied.errors import ConfigError, Problem


def add_parser(subparsers: Subparsers) -> None:
    """Adds `patch`."""
    told = "add expert tying to a launch script or config, or to the sources of Megatron-LM"
    parser = subparsers.add_parser("patch", help=told, description=told)
    patch_config.add_options(parser)
    patch_source.add_options(parser)
    parser.set_defaults(run=_patch)


def _patch(args: argparse.Namespace) -> int:
    if args.megatron_lm is not None:
        # Nothing that was asked for a file may be lost: with --dry-run least of all.
        if about_file := patch_config.stated_options(args):
            valid = f"must be without {', '.join(about_file)}, which is about a launch script or config"
            raise ConfigError(Problem("--megatron-lm", str(args.megatron_lm), valid))
        return patch_source.patch_source(args)
    if args.check or args.revert:
        option = "--check" if args.check else "--revert"
        raise ConfigError(Problem(option, True, "needs --megatron-lm DIR; to see what would change in FILE: --dry-run"))
    if args.file is None:
        raise ConfigError(Problem("FILE", None, "must be a launch script or config, or else --megatron-lm DIR given"))
    return patch_config.patch_config(args)
