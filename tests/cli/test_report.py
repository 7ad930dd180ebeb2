"""`megatron-tied report` as people call it."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from megatron_tied.cli.main import main
from tests.report.synthetic_runs import TIED, UNTIED, Synthetic, write_config, write_lines


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("runs")
    untied = Synthetic(UNTIED, seed=1).write(root / "untied")
    return untied, Synthetic(TIED, seed=2).write(root / "tied [x]", finished=False)


def lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_one_run(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(runs[1])]) == 0
    shown = lines(capsys.readouterr().out)
    for line in (
        "tied [x]",
        "topology 8 layers: 0 [1 2] [3 4] [5 6] 7",
        "steps 300 of 600, stopped",
        "parameters stored 7,000,000 of 10,000,000 untied (70.0%)",
        "peak memory, GB 4.100 of 4.400 planned (93%)",
        f"written: {runs[1]}/report.html",
    ):
        assert line in shown, "\n".join(shown)
    assert "</html>" in (runs[1] / "report.html").read_text(encoding="utf-8")


def test_several_runs(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", *map(str, runs)]) == 0
    shown = lines(capsys.readouterr().out)
    for line in (
        "untied tied [x]",
        "steps 600 of 600, finished 300 of 600, stopped",
        "weights, optimizer, GB 2.900 of 2.900 planned (100%) 2.000 of 2.000 planned (100%) (0.690 x)",
        "written: report.html",
    ):
        assert line in shown, "\n".join(shown)
    assert sum("chance 0.062" in line for line in shown) == 3
    assert (tmp_path / "report.html").is_file()


def test_where_it_is_written(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "page.html"
    assert main(["report", str(runs[0]), "--output", str(output)]) == 0
    assert f"written: {output}" in capsys.readouterr().out
    assert output.is_file()
    assert not (runs[0] / "report.html").exists()


def test_a_config_that_cannot_be_read_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path, [{"step": 1, "loss": 1.25}], end="{")
    write_config(tmp_path)
    with (tmp_path / "config.yaml").open("a") as config:
        config.write("of_the_future: {a: 1}\n")
    assert main(["report", str(tmp_path)]) == 0
    shown = " ".join(lines(capsys.readouterr().out))
    assert "training loss 1.2500" in shown
    assert "this version cannot read config.yaml: of_the_future" in shown
    assert "left out: 1 broken line of metrics.jsonl" in shown


def failing(*arguments: Path | str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["report", *map(str, arguments)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    return told.err


def test_bad_directories_are_told_all_at_once(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    told = failing(tmp_path / "none", runs[0], tmp_path / "empty", runs[0] / ".." / "untied", capsys=capsys)
    assert "error: 3 problems" in told
    assert f"RUN_DIR = '{tmp_path}/none': must be a directory" in told
    assert f"RUN_DIR = '{tmp_path}/empty': must be the directory of a run: there is no metrics.jsonl in it" in told
    assert "untied': must be given once only" in told


def test_a_path_one_level_too_high(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    told = failing(runs[0].parent, capsys=capsys)
    assert f"there is no metrics.jsonl in it, but in {min(runs)}" in told


def test_what_is_no_directory_has_one_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = failing(tmp_path / "none", capsys=capsys)
    assert "must be a directory" in told
    assert "--output" not in told


def test_no_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = failing(write_lines(tmp_path, []), capsys=capsys)
    assert f"RUN_DIR = '{tmp_path}': must hold metrics.jsonl with at least one metric: it has none" in told


def test_bad_outputs(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = failing(runs[0], "--output", tmp_path / "no" / "page.html", capsys=capsys)
    assert f"--output = '{tmp_path}/no/page.html': must lie in a directory that exists: {tmp_path}/no" in told
    assert "must be a file, not a directory" in failing(runs[0], "--output", tmp_path, capsys=capsys)


def test_an_output_that_cannot_be_written(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / ("x" * 250)  # as long as a name may be, and longer while it is being written
    assert main(["report", str(runs[0]), "--output", str(output)]) == 2
    assert "cannot be written: File name too long" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_it_does_without_torch(arguments: list[str], runs: tuple[Path, Path], tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from megatron_tied.cli.main import main\n"
        "try: assert main(['report', *sys.argv[1:]]) == 0\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'deepspeed', 'megatron.core', 'matplotlib.pyplot'}\n"
        "print('heavy:', sorted(sys.modules.keys() & heavy), 'numpy' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code, *(arguments or map(str, runs))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == f"heavy: [] {not arguments}"
    assert done.stderr == ""


def test_a_long_read_shows_how_far_it_is(runs: tuple[Path, Path], tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from megatron_tied.cli import main, report\n"
        "report._BAR_AFTER_SECONDS = 0\n"
        "sys.exit(main.main(['report', *sys.argv[1:]]))\n"
    )
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    command = [sys.executable, "-c", code, *map(str, runs)]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=theirs, check=True, cwd=tmp_path)
    os.set_blocking(ours, False)
    # Before the other end is closed: with it goes what has not been read.
    shown = os.read(ours, 1 << 16).decode()
    os.close(theirs)
    os.close(ours)
    assert "reading" in shown
    assert "B/s]" in shown
