"""The command as people meet it: help, version, and how bad input ends."""

import argparse
import io
import subprocess
import sys

import pytest

from megatron_tied.bad_input import report
from megatron_tied.cli import main as cli
from megatron_tied.errors import ConfigError, Problem

HEAVY = {"torch", "deepspeed", "megatron.core", "transformers", "sentencepiece", "numpy"}


def test_help_lists_the_commands_and_imports_nothing_heavy():
    heavy = HEAVY | {"pydantic", "omegaconf", "rich", "tqdm"}
    code = (
        "import sys\n"
        "from megatron_tied.cli.main import main\n"
        "for arguments in ([], ['plan'], ['patch']):\n"
        "    try: main([*arguments, '--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        f"print('heavy:', sorted(sys.modules.keys() & {heavy!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "prepare-data" in done.stdout
    assert "--module megatron_tied.pretrain --config FILE" in done.stdout
    assert "heavy: []" in done.stdout


def test_training_explains_itself_without_loading_torch():
    code = (
        "import sys\n"
        "from megatron_tied.pretrain import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        f"print('heavy:', sorted(sys.modules.keys() & {HEAVY!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "deepspeed --module megatron_tied.pretrain --config FILE [section.field=value ...]" in " ".join(
        done.stdout.split()
    )
    assert "local_rank" not in done.stdout
    assert "heavy: []" in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("megatron-tied ")


def test_no_command_is_bad_input(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        cli.main([])
    assert end.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


class Command:
    """A subcommand that ends as it is told."""

    def __init__(self, outcome: int | ConfigError):
        self.outcome = outcome

    def add_parser(self, subparsers: argparse._SubParsersAction) -> None:
        subparsers.add_parser("try").set_defaults(run=self.run)

    def run(self, args: argparse.Namespace) -> int:
        if isinstance(self.outcome, ConfigError):
            raise self.outcome
        return self.outcome


def test_exit_code_is_the_commands(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "_COMMANDS", (Command(5),))
    assert cli.main(["try"]) == 5


def test_bad_input_is_told_on_stderr_and_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    error = ConfigError([Problem("--workers", 0, "must be >= 1"), Problem("--output", "", "must be a path")])
    monkeypatch.setattr(cli, "_COMMANDS", (Command(error),))
    assert cli.main(["try"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines() == [
        "error: 2 problems in the configuration",
        "  --workers = 0: must be >= 1",
        "  --output = '': must be a path",
    ]


def test_one_problem_is_one_line_whatever_its_value():
    stream = io.StringIO()
    report(ConfigError(Problem("data.train", "two\nlines", "must be a path")), stream)
    assert stream.getvalue() == (
        "error: 1 problem in the configuration\n  data.train = 'two\\nlines': must be a path\n"
    )
