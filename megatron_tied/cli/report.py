"""`megatron-tied report`: one training run, or several compared, in the terminal and as an HTML page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tied.cli.options import Subparsers
from megatron_tied.errors import ConfigError, Problem

if TYPE_CHECKING:
    from megatron_tied.report.history import RunHistory

_PAGE = "report.html"
_BAR_AFTER_SECONDS = 1.0


def add_parser(subparsers: Subparsers) -> None:
    """Adds `report`."""
    told = "losses, speed, memory, routing and tied groups of a run, or of several compared, as text and as HTML"
    parser = subparsers.add_parser("report", help=told, description=told)
    parser.add_argument(
        "directories", metavar="RUN_DIR", type=Path, nargs="+", help="of a run; the others are compared with the first"
    )
    parser.add_argument(
        "--output",
        metavar="FILE.html",
        type=Path,
        help=f"default: {_PAGE} in RUN_DIR, or for several runs in the working directory",
    )
    parser.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    directories: list[Path] = args.directories
    _check(directories, args.output)
    output: Path = args.output or (directories[0] / _PAGE if len(directories) == 1 else Path(_PAGE))
    histories = _read(directories)
    # With numpy and matplotlib behind them they are not for those who ask for help.
    from megatron_tied.cli.console import console
    from megatron_tied.files import write_whole
    from megatron_tied.report.html_report import html_report
    from megatron_tied.report.terminal_report import terminal_report

    try:
        write_whole(output, html_report(histories))
    except OSError as error:
        raise ConfigError(Problem("--output", str(output), f"cannot be written: {error.strerror}")) from None
    console().print(terminal_report(histories))
    print(f"\nwritten: {output}")
    return 0


def _check(directories: Sequence[Path], output: Path | None) -> None:
    from megatron_tied.report.history import find_problem

    problems = [problem for directory in directories if (problem := find_problem(directory))]
    resolved = [directory.resolve() for directory in directories]
    problems += [
        Problem("RUN_DIR", str(directory), "must be given once only")
        for place, directory in enumerate(directories)
        if resolved[place] in resolved[:place]
    ]
    if output is not None and not output.parent.is_dir():
        problems.append(Problem("--output", str(output), f"must lie in a directory that exists: {output.parent}"))
    elif output is not None and output.is_dir():
        problems.append(Problem("--output", str(output), "must be a file, not a directory"))
    if problems:
        raise ConfigError(problems)


def _read(directories: Sequence[Path]) -> list[RunHistory]:
    from tqdm import tqdm

    from megatron_tied.report.history import read_history
    from megatron_tied.run_directory import METRICS
    from megatron_tied.training.config_file import load_config

    total = sum((directory / METRICS).stat().st_size for directory in directories)
    with tqdm(
        total=total, desc="reading", unit="B", unit_scale=True, leave=False, disable=None, delay=_BAR_AFTER_SECONDS
    ) as bar:
        return [
            read_history(directory, lambda path: load_config(path).topology(), bar.update) for directory in directories
        ]
