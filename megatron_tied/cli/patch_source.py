"""`megatron-tied patch --megatron-lm DIR [--check | --revert]`: our lines in a Megatron-LM tree."""

from __future__ import annotations

import argparse
from pathlib import Path

NOT_PATCHED = 1  # the exit code of --check for a known tree that is not exactly as patched


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that are about a source tree."""
    group = parser.add_argument_group("a Megatron-LM tree")
    group.add_argument(
        "--megatron-lm",
        type=Path,
        metavar="DIR",
        help="add the --moe-tie-* flags and what they need to the sources in DIR",
    )
    instead = group.add_mutually_exclusive_group()
    instead.add_argument("--check", action="store_true", help="change nothing; exit 0 if DIR is exactly as patched")
    instead.add_argument("--revert", action="store_true", help="restore every byte of DIR")


def patch_source(args: argparse.Namespace) -> int:
    """Does what the options ask for. Raises ConfigError for a tree that cannot be patched, checked or restored."""
    from megatron_tied.patching.source_tree import apply, check, revert

    action = check if args.check else revert if args.revert else apply
    report = action(args.megatron_lm)
    print(*report.lines(), sep="\n")
    return NOT_PATCHED if args.check and not report.is_patched else 0
