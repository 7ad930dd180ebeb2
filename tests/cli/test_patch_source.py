"""`megatron-tied patch --megatron-lm DIR` as people meet it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_tied.cli.main import main
from megatron_tied.patching import source_patch
from tests.patching.source_trees import TRAINING, make_patches, make_tree, snapshot


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    patches = make_patches(tmp_path / "patches")
    monkeypatch.setattr(source_patch, "_shipped", lambda: patches)
    return make_tree(tmp_path / "tree")


def test_it_patches_checks_and_reverts(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, command = snapshot(tree), ["patch", "--megatron-lm", str(tree)]
    assert main([*command, "--check"]) == 1
    assert snapshot(tree) == before
    assert capsys.readouterr().out.startswith(f"{tree}: not patched; the patch for v9 would apply\n")
    assert main(command) == 0
    assert capsys.readouterr().out.startswith(f"{tree}: patched for v9, by megatron-tied ")
    assert main([*command, "--check"]) == 0
    assert capsys.readouterr().out.count("  patched\n") == 3
    assert main(command) == 2
    output = capsys.readouterr()
    assert "is already patched" in output.err
    assert output.out == ""
    assert main([*command, "--revert"]) == 0
    assert capsys.readouterr().out.startswith(f"{tree}: not patched")
    assert snapshot(tree) == before


def test_a_tree_that_differs_does_not_pass_the_check(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["patch", "--megatron-lm", str(tree)])
    (tree / TRAINING).write_text("x = 1\n")
    assert main(["patch", "--megatron-lm", str(tree), "--check"]) == 1
    assert f"  {TRAINING}   changed\n" in capsys.readouterr().out


def test_what_is_no_tree_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--check"], ["--revert"]):
        assert main(["patch", "--megatron-lm", str(tmp_path), *more]) == 2
        assert "must be the root of a Megatron-LM tree" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--check", "--revert"])
def test_an_action_needs_a_tree(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["patch", option]) == 2
    assert "--megatron-lm" in capsys.readouterr().err


def test_check_and_revert_are_one_or_the_other(tree: Path) -> None:
    with pytest.raises(SystemExit):
        main(["patch", "--megatron-lm", str(tree), "--check", "--revert"])
