"""`megatron-tied patch FILE`: tie flags, keys and the launcher in a launch script or config."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.megatron_lm.arguments import divisor, integers
from megatron_tied.patching.request import GROUP_SIZE, TieRequest

if TYPE_CHECKING:
    from rich.console import Console

    from megatron_tied.patching.config_patch import ConfigPatch

# Fields of TieConfig by their option.
_OPTIONS = {
    "group_size": "tie_group_size",
    "skip_first": "tie_skip_first",
    "skip_last": "tie_skip_last",
    "pattern": "tie_pattern",
    "block_size": "tie_block_size",
    "banks": "tie_banks",
    "num_tied_experts": "tie_num_experts",
    "lr_divisor": "tie_lr_divisor",
    "pipeline": "tie_pipeline",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that are about a file."""
    parser.add_argument(
        "file",
        nargs="?",
        type=Path,
        metavar="FILE",
        help="a shell script, a file of arguments, YAML (flags, --yaml-cfg, Megatron-Bridge) or a ds_config.json",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there, and leave FILE as it is")
    parser.add_argument("--dry-run", action="store_true", help="show what would change, and write nothing")
    parser.add_argument(
        "--launcher",
        choices=("run", "none"),
        default="run",
        help="none: for a tree that carries the source patch; the script is then run as before",
    )
    group = parser.add_argument_group("tie groups", "as in the tie section of a run config")
    group.add_argument("--tie-group-size", type=int, metavar="N", help=f"MoE layers per tie group ({GROUP_SIZE})")
    group.add_argument("--tie-skip-first", type=int, metavar="N", help="untied first MoE layers (2)")
    group.add_argument("--tie-skip-last", type=int, metavar="N", help="untied last MoE layers (2)")
    group.add_argument("--tie-pattern", choices=("consecutive", "cyclic"))
    group.add_argument("--tie-block-size", type=int, metavar="N", help="of cyclic (1)")
    group.add_argument("--tie-banks", type=integers, metavar="0,1,1,2", help="the bank of each MoE layer")
    group.add_argument("--tie-num-experts", type=int, metavar="N", help="experts of a tied bank")
    group.add_argument("--tie-lr-divisor", type=divisor, metavar="sqrt|linear|none|X")
    group.add_argument("--tie-pipeline", choices=("align", "allreduce"))


def stated_options(args: argparse.Namespace) -> list[str]:
    """What the user said that is about a file, the file itself first."""
    names = ["output", *_OPTIONS.values()]
    # 0 is an answer, too.
    given = [f"--{name.replace('_', '-')}" for name in names if not isinstance(getattr(args, name), bool | None)]
    given += ["--dry-run"] if args.dry_run else []
    given += ["--launcher"] if args.launcher != "run" else []
    return ["FILE", *given] if args.file is not None else given


def patch_config(args: argparse.Namespace) -> int:
    """Patches `args.file`. Raises ConfigError, with nothing changed, for a file that cannot be patched."""
    # With pydantic and rich behind them they are not for those who ask for help.
    from megatron_tied.cli.console import console
    from megatron_tied.patching.config_patch import patch_text
    from megatron_tied.patching.diff import diff
    from megatron_tied.patching.text_file import read_text, replace_text

    given = {name: value for name, option in _OPTIONS.items() if (value := getattr(args, option)) is not None}
    request = TieRequest.of(given)
    _check_output(args.file, args.output)
    patch = patch_text(args.file, read_text(args.file), request, launcher=args.launcher == "run")
    if not args.dry_run and (patch.changes or args.output):
        replace_text(args.output or args.file, patch.after, like=args.file)
    out = console()
    if patch.changes:
        out.print(diff(patch.before, patch.after, str(args.file)), end="", soft_wrap=True)
    _tell(patch, out)
    done = "nothing was written: --dry-run" if args.dry_run else f"patched {args.file}"
    told = done if patch.changes else f"{args.file}: {'already tied, ' if patch.is_tied else ''}nothing changed"
    written = f"; written to {args.output}" if args.output and not args.dry_run else ""
    out.print(told + written, soft_wrap=True, markup=False)
    return 0


def _tell(patch: ConfigPatch, out: Console) -> None:
    if patch.saved is not None:
        for line in patch.saved.lines():
            out.print(line, soft_wrap=True, markup=False)
    for note in patch.notes:
        out.print(note, soft_wrap=True, markup=False)
    for problem in patch.warnings:
        out.print(f"warning: {problem}", soft_wrap=True, markup=False, style="yellow")


def _check_output(file: Path, output: Path | None) -> None:
    if output is not None and output.exists() and not (file.exists() and output.samefile(file)):
        raise ConfigError(Problem("--output", str(output), "must not exist: another file would be lost"))
