"""Applying, checking and reverting the source patch, on trees of our own: sound and broken."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_tied import __version__
from megatron_tied.patching import source_tree
from megatron_tied.patching.source_record import RECORD
from megatron_tied.patching.source_tree import State, apply, check, revert
from tests.patching.source_trees import ARGUMENTS, BUILDERS, FILES, TRAINING, make_patches, make_tree, refused, snapshot


def test_apply_writes_our_lines_and_no_other_byte(tree: Path, patches: Path) -> None:
    assert apply(tree, patches).is_patched
    head = (
        b"# Added by `megatron-tied patch`; its `--revert` takes it out again.\n"
        b"from megatron_tied.megatron_lm import hooks as megatron_tied_hooks\n"
    )
    assert (tree / ARGUMENTS).read_bytes() == (
        b"import argparse\n\n"
        + head
        + b"\n\n@megatron_tied_hooks.with_tie_checks\ndef validate(args):\n    return args\n\n"
        + b"@megatron_tied_hooks.with_tie_arguments\ndef add_flags(\n    parser,\n):\n    return parser\n\n"
        + b"def parser():\n    return add_flags(argparse.ArgumentParser())\n"
    )
    assert (tree / BUILDERS).read_bytes() == (
        b"from specs import block_spec\r\n\r\n\r\n"
        + head
        + b"\nblock_spec = megatron_tied_hooks.with_tied_layers(block_spec)\n\n\n"
        + b"def build(config):\r\n    return block_spec(config)"
    )
    assert (tree / TRAINING).read_bytes() == (
        b"from functools import (\n    cache,\n    partial as finalize,\n)\n\n\n"
        + head
        + b"\nfinalize = megatron_tied_hooks.with_bank_copies_summed(finalize)\n\n\n"
        + b"@megatron_tied_hooks.with_tied_chunks\n"
        + b"@cache\n@finalize(\n    print,\n)\ndef get_model(provider):\n    return provider()\n"
    )
    assert snapshot(tree).keys() == FILES.keys() | {RECORD}


def test_a_patched_file_has_the_flags(tree: Path, patches: Path) -> None:
    apply(tree, patches)
    module: dict = {}
    exec(compile((tree / ARGUMENTS).read_bytes(), ARGUMENTS, "exec"), module)
    assert "--moe-tie-group-size" in module["parser"]().format_help()


def test_check_tells_what_is_there(tree: Path, patches: Path) -> None:
    before = snapshot(tree)
    assert check(tree, patches).lines() == [
        f"{tree}: not patched; the patch for v9 would apply",
        "  builders.py                     pristine",
        "  megatron/training/arguments.py  pristine",
        "  megatron/training/training.py   pristine",
    ]
    assert snapshot(tree) == before
    done = apply(tree, patches)
    before = snapshot(tree)
    found = check(tree, patches)
    assert found == done
    assert found.is_patched
    assert found.lines() == [
        f"{tree}: patched for v9, by megatron-tied {__version__} on {done.record.date}",
        "  builders.py                     patched",
        "  megatron/training/arguments.py  patched",
        "  megatron/training/training.py   patched",
    ]
    assert snapshot(tree) == before


def test_revert_restores_every_byte_and_mode(tree: Path, patches: Path) -> None:
    (tree / ARGUMENTS).chmod(0o750)
    (tree / BUILDERS).chmod(0o444)
    before = snapshot(tree)
    apply(tree, patches)
    assert {path: mode for path, (_, mode) in snapshot(tree).items() if path != RECORD} == {
        path: mode for path, (_, mode) in before.items()
    }
    assert revert(tree, patches).is_pristine
    assert snapshot(tree) == before


@pytest.mark.parametrize("allowed", [True, False])
def test_a_files_owner_is_kept_where_that_is_allowed(
    tree: Path, patches: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    owners = []

    def chown(path: Path, uid: int, gid: int) -> None:
        owners.append((uid, gid))
        if not allowed:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    monkeypatch.setattr(os, "chown", chown)
    assert apply(tree, patches).is_patched
    assert owners == [((tree / ARGUMENTS).stat().st_uid, (tree / ARGUMENTS).stat().st_gid)] * 3


def test_other_files_of_the_tree_may_be_the_users_own(tree: Path, patches: Path) -> None:
    (tree / "megatron/training/mine.py").write_text("x = 1\n")
    apply(tree, patches)
    revert(tree, patches)
    assert (tree / "megatron/training/mine.py").read_text() == "x = 1\n"


def test_patching_twice_is_refused(tree: Path, patches: Path) -> None:
    date = apply(tree, patches).record.date
    assert refused(apply, tree, patches) == [
        f"--megatron-lm = {str(tree)!r}: is already patched (for v9, by megatron-tied {__version__} on {date}): "
        "use --check or --revert"
    ]


def test_reverting_what_is_not_patched_is_refused(tree: Path, patches: Path) -> None:
    assert refused(revert, tree, patches) == [f"--megatron-lm = {str(tree)!r}: is not patched: it is v9 as released"]


def put_line_above(content: bytes) -> bytes:
    return b"\n" + content


def double_anchor(content: bytes) -> bytes:
    return content + b"\ndef validate(args):\n    pass\n"


def change_signature(content: bytes) -> bytes:
    return content.replace(b"def validate(args)", b"def validate(args, more)")


def change_elsewhere(content: bytes) -> bytes:
    return content + b"\n"


def use_other_line_endings(content: bytes) -> bytes:
    return content.replace(b"\n", b"\r\n")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (put_line_above, "`validate` has moved from line 3 to 4; `add_flags` has moved from line 6 to 7"),
        (double_anchor, "`validate` has moved from line 3 to 3, 14"),
        (change_signature, "`validate`, line 3, has vanished or is defined otherwise"),
        (change_elsewhere, "its anchors are in place, other lines differ"),
        (use_other_line_endings, "its anchors are in place, other lines differ"),
    ],
)
def test_a_dirty_tree_is_refused(tree: Path, patches: Path, change: Callable[[bytes], bytes], told: str) -> None:
    (tree / ARGUMENTS).write_bytes(change((tree / ARGUMENTS).read_bytes()))
    for action in (apply, revert):
        problems = refused(action, tree, patches)
        assert problems[0].startswith(f"--megatron-lm = {str(tree)!r}: is a dirty tree: it states the version of v9")
        assert problems[1:] == [f"{ARGUMENTS} = 'changed': must be as in v9: {told}"]
    found = check(tree, patches)
    assert found.files_that_are(State.CHANGED) == [ARGUMENTS]
    assert found.lines()[0] == f"{tree}: files differ from v9: the patch would not apply"


def test_a_missing_file_and_a_link_are_named(tree: Path, patches: Path) -> None:
    (tree / BUILDERS).unlink()
    (tree / TRAINING).rename(tree / "mine.py")
    (tree / TRAINING).symlink_to(tree / "mine.py")
    assert refused(apply, tree, patches)[1:] == [
        f"{BUILDERS} = 'missing': must be as in v9",
        f"{TRAINING} = 'changed': must be as in v9: it is a link",
    ]


def test_an_unknown_version_is_told_what_there_is(tree: Path, tmp_path: Path) -> None:
    # Not even with the very files of a known tag: what else that version changed, nobody has looked at.
    (tree / source_tree.VERSION_FILE).write_bytes(b"MAJOR = 9\nMINOR = 9\nPATCH = 0\nPRE_RELEASE = 'rc1'\n")
    patches = make_patches(tmp_path / "patches", v9=FILES, v10=FILES)
    for action in (apply, check, revert):
        (problem,) = refused(action, tree, patches)
        assert "states version 9.9.0rc1" in problem
        assert "v10 (states 9.8.7), v9 (states 9.8.7)" in problem
        assert "python -m megatron_tied.megatron_lm pretrain_gpt.py" in problem


@pytest.mark.parametrize("missing", [source_tree.VERSION_FILE, ARGUMENTS])
def test_what_is_not_megatron_lm_is_refused(tree: Path, patches: Path, missing: str) -> None:
    (tree / missing).unlink()
    for action in (apply, check, revert):
        (problem,) = refused(action, tree, patches)
        assert problem.endswith(f"must be the root of a Megatron-LM tree: it has no {missing}")


def test_of_tags_that_state_one_version_the_files_decide(tree: Path, tmp_path: Path) -> None:
    other = FILES | {BUILDERS: FILES[BUILDERS] + b"\r\n"}
    patches = make_patches(tmp_path / "patches", a=other, b=FILES, c=other | {ARGUMENTS: b"def validate(args): ...\n"})
    assert apply(tree, patches).patch.tag == "b"


def test_a_file_that_was_changed_since_is_left_alone(tree: Path, patches: Path) -> None:
    date = apply(tree, patches).record.date
    with (tree / TRAINING).open("ab") as file:
        file.write(b"x = 1\n")
    for action in (apply, revert):
        assert refused(action, tree, patches) == [
            f"--megatron-lm = {str(tree)!r}: is patched for v9, by megatron-tied {__version__} on {date}, "
            "but has been changed since: nothing was done",
            f"{TRAINING} = 'changed': must be as in v9, with the patch's lines and no other change",
        ]
    found = check(tree, patches)
    assert found.files_that_are(State.CHANGED) == [TRAINING]
    assert found.lines()[0].endswith("--revert is refused")


def test_a_lost_record_is_no_loss(tree: Path, patches: Path) -> None:
    before = snapshot(tree)
    apply(tree, patches)
    (tree / RECORD).unlink()
    found = check(tree, patches)
    assert found.is_patched
    assert found.lines()[0] == f"{tree}: patched for v9, with no {RECORD}"
    assert "already patched" in refused(apply, tree, patches)[0]
    revert(tree, patches)
    assert snapshot(tree) == before


def leave_out_the_diff(record: dict) -> None:
    del record["diff"]


def point_outside(record: dict) -> None:
    record["patch"]["files"] = {f"../{path}": file for path, file in record["patch"]["files"].items()}
    record["diff"] = record["diff"].replace("--- a/", "--- a/../").replace("+++ b/", "+++ b/../")


def take_a_line_from_a_hunk(record: dict) -> None:
    record["diff"] = record["diff"].replace("+@megatron_tied_hooks.with_tie_checks\n", "", 1)


@pytest.mark.parametrize("damage", [leave_out_the_diff, point_outside, take_a_line_from_a_hunk])
def test_a_record_that_makes_no_sense_is_refused(tree: Path, patches: Path, damage: Callable[[dict], None]) -> None:
    apply(tree, patches)
    record = json.loads((tree / RECORD).read_text())
    damage(record)
    (tree / RECORD).write_text(json.dumps(record))
    for action in (apply, check, revert):
        (problem,) = refused(action, tree, patches)
        assert "is no record that this version can read" in problem
        assert problem.startswith(RECORD)


def test_a_record_outlived_by_its_patch_hinders_nothing(tree: Path, patches: Path) -> None:
    apply(tree, patches)
    before = snapshot(make_tree(tree))  # as `git checkout .` does
    assert check(tree, patches).is_pristine
    revert(tree, patches)
    del before[RECORD]
    assert snapshot(tree) == before
    apply(tree, patches)
    make_tree(tree)
    assert apply(tree, patches).is_patched


def test_a_record_of_another_tag_hinders_nothing(tree: Path, patches: Path, tmp_path: Path) -> None:
    apply(tree, patches)
    other = {path: content + b"\n" for path, content in FILES.items()}
    make_tree(tree, other)
    both = make_patches(tmp_path / "both", v9=FILES, v10=other)
    assert check(tree, both).is_pristine
    assert apply(tree, both).patch.tag == "v10"
    assert check(tree, both).record.patch.tag == "v10"
