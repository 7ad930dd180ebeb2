"""`megatron-tied patch FILE` as people type it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tied.cli.main import main
from megatron_tied.topology import TieConfig, TieTopology
from tests.patching.config_cases import golden, source


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "array.sh"
    path.write_text(source("array.sh"))
    path.chmod(0o750)
    return path


def snapshot(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_a_script_is_patched_in_place(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["patch", str(script)]) == 0
    assert script.read_text() == golden("array.sh")
    assert stat.S_IMODE(script.stat().st_mode) == 0o750
    assert list(script.parent.iterdir()) == [script]
    told = capsys.readouterr().out
    for part in (
        f"--- {script}",
        "+    --moe-tie-group-size 4\n",
        "12 layers: 0 1 [2 3 4 5] [6 7 8 9] 10 11",
        "8 ranks, expert parallel 4; distributed optimizer, bf16",
        f"patched {script}\n",
    ):
        assert part in told
    assert "\x1b" not in told


def test_the_second_time_nothing_is_written(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["patch", str(script)])
    before = script.stat()
    capsys.readouterr()
    assert main(["patch", str(script)]) == 0
    assert (script.stat().st_mtime_ns, script.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    told = capsys.readouterr().out
    assert f"{script}: already tied, nothing changed\n" in told
    assert "+++" not in told


def test_a_dry_run_writes_nothing(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["patch", "--dry-run", str(script), "--tie-group-size", "2"]) == 0
    assert script.read_text() == source("array.sh")
    told = capsys.readouterr().out
    assert "+    --moe-tie-group-size 2\n" in told
    assert "nothing was written: --dry-run" in told
    main(["patch", str(script)])
    capsys.readouterr()
    main(["patch", "--dry-run", str(script)])
    assert f"{script}: already tied, nothing changed\n" in capsys.readouterr().out


def test_output_leaves_the_file_as_it_is(script: Path) -> None:
    output = script.with_name("tied.sh")
    assert main(["patch", str(script), "--output", str(output)]) == 0
    assert (script.read_text(), output.read_text()) == (source("array.sh"), golden("array.sh"))
    assert stat.S_IMODE(output.stat().st_mode) == 0o750


def test_output_may_be_the_file_itself(script: Path) -> None:
    assert main(["patch", str(script), "--output", str(script)]) == 0
    assert script.read_text() == golden("array.sh")


def test_a_link_stays_one(script: Path) -> None:
    link = script.with_name("link.sh")
    link.symlink_to(script.name)
    assert main(["patch", str(link)]) == 0
    assert link.is_symlink()
    assert script.read_text() == golden("array.sh")


def test_all_options_are_written(script: Path) -> None:
    options = (
        "--tie-group-size 2 --tie-skip-first 1 --tie-skip-last 3 --tie-pattern cyclic --tie-block-size 2 "
        "--tie-num-experts 24 --tie-lr-divisor 1.5 --tie-pipeline allreduce --launcher none"
    )
    assert main(["patch", str(script), *options.split()]) == 0
    lines = script.read_text().splitlines()
    place = next(index for index, line in enumerate(lines) if "--num-experts" in line)
    assert [line.strip() for line in lines[place + 1 : place + 9]] == [
        "--moe-tie-group-size 2",
        "--moe-tie-skip-first 1",
        "--moe-tie-skip-last 3",
        "--moe-tie-pattern cyclic",
        "--moe-tie-block-size 2",
        "--moe-tie-num-experts 24",
        "--moe-tie-lr-divisor 1.5",
        "--moe-tie-pipeline allreduce",
    ]
    assert "megatron_tied" not in script.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tie-group-size", "20"], "tie.group_size = 20: must be at most 8"),
        (["--tie-group-size", "1"], "1 ties nothing"),
        (["--tie-banks", "0,1,1"], "must have one entry per MoE layer: 12, not 3"),
        (["--tie-lr-divisor", "cube"], "tie.lr_divisor = 'cube'"),
        (["--output", "OTHER"], "must not exist: another file would be lost"),
        (["--output", "nowhere/x.sh"], "must be a place to write to"),
        (["--check"], "--check = True: needs --megatron-lm DIR"),
        (["--megatron-lm", "."], "--megatron-lm = '.': must be without FILE, which is about a launch script"),
    ],
)
def test_bad_input_changes_nothing(
    script: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(script.parent)
    Path("OTHER").write_text("mine")
    before = snapshot(script.parent)
    assert main(["patch", str(script), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert snapshot(script.parent) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "must be a file that can be read"),
        (b"\xff\xfe--num-experts", "must be UTF-8 text"),
        (b"", "nothing in it"),
    ],
)
def test_a_file_that_cannot_be_read(
    tmp_path: Path, content: bytes | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.sh"
    if content is not None:
        path.write_bytes(content)
    assert main(["patch", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_neither_file_nor_tree(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["patch"]) == 2
    assert "FILE = None: must be a launch script or config, or else --megatron-lm DIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--dry-run"], ["--output", "x"], ["--tie-skip-first", "0"], ["--launcher", "none"]]
)
def test_options_about_a_file_do_not_go_with_a_tree(
    tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["patch", "--megatron-lm", str(tmp_path), *options]) == 2
    assert f"must be without {options[0]}, which is about a launch script or config" in capsys.readouterr().err


def test_a_contradiction_is_told_and_nothing_changed(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script.write_text(golden("array.sh"))
    assert main(["patch", str(script), "--tie-group-size", "2"]) == 2
    assert (
        "--moe-tie-group-size = '4': is what this file ties by already, but 2 is asked for" in capsys.readouterr().err
    )
    assert script.read_text() == golden("array.sh")


def test_an_interrupted_write_leaves_the_file_whole(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    before = snapshot(script.parent)
    monkeypatch.setattr(os, "replace", interrupted)
    assert main(["patch", str(script)]) == 130
    assert snapshot(script.parent) == before


def test_warnings_and_what_is_left_to_do_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "flags.yaml"
    path.write_text(source("flags.yaml"))
    assert main(["patch", str(path), "--tie-group-size", "2", "--tie-skip-first", "1", "--tie-skip-last", "1"]) == 0
    told = capsys.readouterr().out
    assert "warning: --pipeline-model-parallel-layout = 'Et*8|(tt)*3L': (layers 0-7 | 8-13) parts" in told
    assert "the script that reads this file needs: torchrun [its options] -m megatron_tied.megatron_lm" in told


def test_the_lines_for_a_recipe_are_python_that_ties(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(source("recipe.yaml"))
    assert main(["patch", str(path), "--tie-group-size", "2", "--tie-pipeline", "allreduce"]) == 0
    assert path.read_text() == source("recipe.yaml")
    told = capsys.readouterr().out
    assert "is divided when what cfg.optimizer_config_override_provider builds is merged" in told
    assert "sum_bank_copies(model_chunks) must follow finalize_model_grads" in told
    lines = [
        line.removeprefix("    ")
        for line in told.splitlines()
        if (line.startswith("    ") and "=" in line) or "import" in line
    ]
    hooks: list[object] = []
    model = type("Model", (), {"moe_layer_freq": 1, "register_pre_wrap_hook": staticmethod(hooks.append)})
    exec("\n".join(lines), {"cfg": type("Config", (), {"model": model})})
    (hook,) = hooks
    assert hook.func.__name__ == "tie_experts"
    assert hook.keywords["topology"] == TieTopology.build(TieConfig(group_size=2, pipeline="allreduce"), 12)


def test_a_patch_loads_no_torch(script: Path) -> None:
    code = (
        "import sys\nfrom megatron_tied.cli.main import main\n"
        f"main(['patch', '--dry-run', {str(script)!r}])\n"
        "print('heavy:', sorted(sys.modules.keys() & {'torch', 'deepspeed', 'megatron.core', 'transformers'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "heavy: []" in done.stdout


def test_the_diff_is_coloured_on_a_terminal(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    terminal = Console(force_terminal=True, width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    monkeypatch.setattr("megatron_tied.cli.console.console", lambda: terminal)
    assert main(["patch", "--dry-run", str(script)]) == 0
    coloured = terminal.export_text(styles=True)
    assert "\x1b[32m+    --moe-tie-group-size 4" in coloured
    assert "\x1b[31m-torchrun" in coloured
