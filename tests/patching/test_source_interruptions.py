"""Runs that are cut off, and trees that another version has patched: always to be told, and to be mended."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tied.errors import ConfigError
from megatron_tied.megatron_lm.hooks import Hook
from megatron_tied.patching import source_tree
from megatron_tied.patching.source_record import RECORD
from megatron_tied.patching.source_tree import State, apply, check, revert
from tests.patching.source_trees import (
    ARGUMENTS,
    FILES,
    HOOKS,
    interrupted,
    make_patches,
    refused,
    snapshot,
)

IN_ORDER = ["builders.py", "megatron/training/arguments.py", "megatron/training/training.py"]


@pytest.mark.parametrize("done", [0, 1, 2])
@pytest.mark.parametrize("then", ["apply", "revert"])
def test_an_interrupted_apply_is_told_and_mended(tree: Path, patches: Path, done: int, then: str) -> None:
    before = snapshot(tree)
    told = interrupted(apply, tree, patches, at=1 + done)  # the record's is the first
    assert "may be written in part (Input/output error): run the same command again, or --revert" in told
    assert snapshot(tree).keys() == FILES.keys() | {RECORD}
    found = check(tree, patches)
    assert found.files_that_are(State.PATCHED) == IN_ORDER[:done]
    assert found.files_that_are(State.PRISTINE) == IN_ORDER[done:]
    if done:
        assert found.lines()[0] == f"{tree}: patched in part for v9: patch again to complete it, or --revert"
    assert not found.is_patched
    if then == "apply":
        assert apply(tree, patches).is_patched
        assert check(tree, patches).is_patched
    revert(tree, patches)
    assert snapshot(tree) == before


@pytest.mark.parametrize("done", [1, 2])
def test_an_interrupted_revert_is_told_and_mended(tree: Path, patches: Path, done: int) -> None:
    before = snapshot(tree)
    apply(tree, patches)
    interrupted(revert, tree, patches, at=done)
    assert len(check(tree, patches).files_that_are(State.PRISTINE)) == done
    revert(tree, patches)
    assert snapshot(tree) == before


def test_a_killed_run_is_mended_and_leaves_no_file(tree: Path, patches: Path) -> None:
    before = snapshot(tree)
    code = (
        "import os, sys; from pathlib import Path; from megatron_tied.patching import source_tree as s\n"
        "replace, calls = os.replace, iter(range(9))\n"
        "os.replace = lambda *paths: os._exit(9) if next(calls) == 2 else replace(*paths)\n"
        "s.apply(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    for mend in (apply, revert):
        killed = subprocess.run([sys.executable, "-c", code, tree, patches], check=False)
        assert killed.returncode == 9
        assert len(snapshot(tree)) == len(before) + 3  # the record, and what two files were to become
        mend(tree, patches)
        assert snapshot(tree).keys() - {RECORD} == FILES.keys()
        if mend is apply:
            revert(tree, patches)
        assert snapshot(tree) == before


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_a_full_disk_changes_nothing(tree: Path, patches: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    before = snapshot(tree)
    calls = iter(range(9))

    def full(path: Path) -> None:
        if next(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(source_tree, "sync", full)
    monkeypatch.setattr("megatron_tied.files.sync", full)
    with pytest.raises(ConfigError, match=r"No space left on device\): nothing was changed"):
        apply(tree, patches)
    assert snapshot(tree) == before


def test_a_file_that_cannot_be_read_is_told(tree: Path, patches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(path: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing)
        with pytest.raises(ConfigError) as error:
            check(tree, patches)
    (problem,) = error.value.problems
    assert problem.value == str(tree / IN_ORDER[0])
    assert problem.valid == "cannot be read (Input/output error): nothing was changed"


def test_files_are_on_disk_before_the_first_is_replaced(
    tree: Path, patches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, replace, sync = [], os.replace, source_tree.sync
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append(paths[1]), replace(*paths)))
    monkeypatch.setattr(source_tree, "sync", lambda path: (events.append(path), sync(path)))
    apply(tree, patches)
    files = [tree / path for path in IN_ORDER]
    staged = [path.with_name(f".{path.name}.megatron_tied") for path in files]
    assert events[:7] == [*staged, tree / RECORD, *files]
    assert set(events[7:]) == {tree, (tree / ARGUMENTS).parent}


class TestWhenThePatchHasChanged:
    """A tree that another version of megatron-tied has patched."""

    @pytest.fixture
    def newer(self, tmp_path: Path) -> Path:
        return make_patches(tmp_path / "newer", (*HOOKS, Hook(HOOKS[0].module, "parser", "with_tie_checks")))

    def test_it_is_told_and_taken_out_as_it_was_put_in(self, tree: Path, patches: Path, newer: Path) -> None:
        before = snapshot(tree)
        apply(tree, patches)
        found = check(tree, newer)
        assert found.is_patched
        assert found.lines()[0].endswith("; this version has another patch: --revert, then patch again")
        assert "already patched" in refused(apply, tree, newer)[0]
        revert(tree, newer)
        assert snapshot(tree) == before

    def test_it_is_not_completed(self, tree: Path, patches: Path, newer: Path) -> None:
        before = snapshot(tree)
        interrupted(apply, tree, patches, at=2)
        (problem,) = refused(apply, tree, newer)
        assert "is patched in part" in problem
        assert "whose patch was another: --revert, then patch again" in problem
        revert(tree, newer)
        assert snapshot(tree) == before
