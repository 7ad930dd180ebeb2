"""The command as people meet it: help, version, and how bad input ends."""

import argparse
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tied.bad_input import tell
from megatron_tied.cli import main as cli
from megatron_tied.errors import ConfigError, Problem

CASES = Path(__file__).parents[1] / "patching" / "cases"
HEAVY = {"torch", "deepspeed", "megatron.core", "transformers", "sentencepiece", "numpy"}
HEAVY_FOR_HELP = HEAVY | {"pydantic", "omegaconf", "rich", "tqdm"}


def run_and_watch(*arguments: str, cwd: Path | None = None) -> tuple[str, set[str]]:
    """What a command prints, and the modules that Python says it has imported."""
    command = [sys.executable, "-X", "importtime", "-m", "megatron_tied.cli.main", *arguments]
    done = subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True)
    modules = set(re.findall(r"^import time: .*\| +(\S+)$", done.stderr, re.MULTILINE))
    assert {"argparse", "megatron_tied.errors"} < modules
    return done.stdout, modules


def test_help_lists_the_commands_and_imports_nothing_heavy():
    shown, modules = run_and_watch("--help")
    assert "prepare-data" in shown
    assert "generate" in shown
    assert "--module megatron_tied.pretrain --config FILE" in shown
    assert not modules & HEAVY_FOR_HELP


@pytest.mark.parametrize("command", ["plan", "patch", "generate"])
def test_help_of_a_command_imports_nothing_heavy(command: str):
    shown, modules = run_and_watch(command, "--help")
    assert f"megatron-tied {command}" in shown
    assert not modules & HEAVY_FOR_HELP


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "--arch", "olmoe", "--scale", "tiny", "--world-size", "8", "--search", "--group-sizes", "1,2"),
        ("patch", "command.sh"),
        ("patch", "megatron.yaml"),
    ],
    ids=" ".join,
)
def test_what_needs_no_model_does_not_wait_for_torch(arguments: tuple[str, ...], tmp_path: Path):
    shutil.copytree(CASES, tmp_path, dirs_exist_ok=True)
    shown, modules = run_and_watch(*arguments, cwd=tmp_path)
    assert shown
    assert not {name.partition(".")[0] for name in modules} & {"torch", "deepspeed", "megatron"}


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
        "error: 2 problems in the input",
        "  --workers = 0: must be >= 1",
        "  --output = '': must be a path",
    ]


def test_an_unknown_option_shows_the_usage_of_its_command(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        cli.main(["generate", "--checkpoint", "a", "--prompt", "b", "--max-tokens", "3"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("usage: megatron-tied generate ")


def test_one_problem_is_one_line_whatever_its_value():
    stream = io.StringIO()
    tell(ConfigError(Problem("data.train", "two\nlines", "must be a path")), stream)
    assert stream.getvalue() == ("error: 1 problem in the input\n  data.train = 'two\\nlines': must be a path\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "--arch", "olmoe", "--scale", "tiny", "--world-size", "8"],
        ["plan", "--arch", "olmoe", "--scale", "tiny", "--world-size", "8", "--json"],
        ["patch", str(CASES / "command.sh"), "--dry-run"],
    ],
    ids=" ".join,
)
def test_who_reads_no_further_ends_it_quietly(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "megatron_tied.cli.main", *arguments]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started.stdout.close()
    assert (started.stderr.read(), started.wait()) == ("", 141)


def test_who_reads_no_further_does_not_cost_what_is_written(tmp_path: Path) -> None:
    script = shutil.copy(CASES / "command.sh", tmp_path)
    before = Path(script).read_text()
    command = [sys.executable, "-m", "megatron_tied.cli.main", "patch", str(script)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started.stdout.close()
    assert (started.stderr.read(), started.wait()) == ("", 141)
    assert "--moe-tie-group-size" in Path(script).read_text() != before


def test_without_an_output_at_all() -> None:
    command = f"{sys.executable} -m megatron_tied.cli.main plan --arch olmoe --world-size 8 --json >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.stderr, done.returncode) == ("", 0)
