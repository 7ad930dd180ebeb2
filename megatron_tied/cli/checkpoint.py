"""`megatron-tied checkpoint inspect|verify DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tied.cli.options import Subparsers
from megatron_tied.errors import ConfigError, Problem

if TYPE_CHECKING:
    from megatron_tied.checkpoint.manifest import Manifest


def add_parser(subparsers: Subparsers) -> None:
    """Adds `checkpoint` with its two actions."""
    parser = subparsers.add_parser("checkpoint", help="look into a checkpoint, or check every byte of it")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    for name, action, told in (
        ("inspect", _inspect, "list its banks, tensors and files; reads the manifest only"),
        ("verify", _verify, "read every file again and compare it with its checksum"),
    ):
        sub = actions.add_parser(name, help=told, description=told)
        sub.add_argument("directory", metavar="DIR", type=Path, help="a checkpoint, or a run, whose latest is meant")
        sub.set_defaults(run=action)


def _inspect(args: argparse.Namespace) -> int:
    from megatron_tied.checkpoint.report import report
    from megatron_tied.cli.console import console

    directory, manifest = _read(args.directory)
    console().print(report(directory, manifest))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from megatron_tied.checkpoint.manifest import BrokenCheckpointError
    from megatron_tied.checkpoint.verify import verify

    directory, manifest = _read(args.directory)
    try:
        verify(directory, manifest)
    except BrokenCheckpointError as error:
        raise ConfigError(Problem("DIR", str(args.directory), f"is not sound: {error}")) from None
    print(f"{directory}: sound, {len(manifest.files)} files of {sum(f.bytes for f in manifest.files.values()):,} bytes")
    return 0


def _read(path: Path) -> tuple[Path, Manifest]:
    from megatron_tied.checkpoint.directory import resolve
    from megatron_tied.checkpoint.manifest import BrokenCheckpointError, Manifest

    try:
        directory = resolve(path)
        manifest = Manifest.read(directory)
        manifest.check_presence(directory)
    except BrokenCheckpointError as error:
        raise ConfigError(Problem("DIR", str(path), f"is not sound: {error}")) from None
    return directory, manifest
