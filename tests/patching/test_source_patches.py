"""The patches in `patches/`: that they are what `HOOKS` asks for, and that the trees of their tags take them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tied.megatron_lm import hooks
from megatron_tied.megatron_lm.arguments import NAMES, flag
from megatron_tied.patching import source_tree
from megatron_tied.patching.source_patch import SourcePatch, stated_version, stored_patches
from megatron_tied.patching.source_record import RECORD
from patches import make
from tests.patching.source_trees import ARGUMENTS, BUILDERS, FILES, HOOKS, make_patches, make_tree, snapshot

DIRECTORY = Path(make.__file__).parent
TAGS = ("core_v0.16.1", "core_v0.17.1", "core_v0.18.2", "core_v0.19.0")
STORED = {patch.tag: patch for patch in stored_patches()}
TREES = os.environ.get("MEGATRON_LM_TREES")
on_real_trees = pytest.mark.skipif(not TREES, reason="MEGATRON_LM_TREES names no directory of pristine trees, by tag")


def test_every_tag_has_a_patch_and_every_diff_a_tag() -> None:
    assert tuple(STORED) == TAGS
    assert sorted(path.stem for path in DIRECTORY.glob("*.diff")) == sorted(TAGS)


@pytest.mark.parametrize("tag", TAGS)
def test_a_stored_patch_is_what_the_hooks_ask_for(tag: str) -> None:
    asked = [hook for hook in hooks.HOOKS if f"{hook.module}.{hook.name}" not in STORED[tag].absent]
    assert STORED[tag].files.keys() == set(map(make.path_of, asked)), "run patches/make.py"
    for path, file in STORED[tag].files.items():
        of_file = [hook for hook in asked if make.path_of(hook) == path]
        assert {each.above for each in file.insertions} == set(map(make.anchor_of, of_file)), "run patches/make.py"
        for number, insertion in enumerate(file.insertions):
            here = [hook for hook in of_file if make.anchor_of(hook) == insertion.above]
            assert list(insertion.added) == make.added_lines(here, first=number == 0), "run patches/make.py"
        lines = [insertion.line for insertion in file.insertions]
        assert lines == sorted(set(lines))


@pytest.mark.parametrize("tag", TAGS)
def test_a_stored_patch_names_hooks_that_exist(tag: str) -> None:
    diff = (DIRECTORY / f"{tag}.diff").read_text(encoding="utf-8")
    used = set(re.findall(r"megatron_tied_hooks\.(\w+)", diff))
    assert used
    assert all(callable(getattr(hooks, wrapper)) for wrapper in used)
    named = {f"{hook.module}.{hook.name}" for hook in hooks.HOOKS}
    assert set(STORED[tag].absent) <= named


@pytest.mark.parametrize("tag", TAGS)
def test_a_stored_diff_holds_lines_of_ours_only(tag: str) -> None:
    diff = (DIRECTORY / f"{tag}.diff").read_text(encoding="utf-8")
    kinds = re.compile(r"--- a/\S+|\+\+\+ b/\S+|@@ -\d+,0 \+\d+,\d+ @@|\+.*")
    assert [line for line in diff.splitlines() if not kinds.fullmatch(line)] == []
    assert STORED[tag].diff() == diff


def test_hooks_of_other_versions_are_noted_as_absent(tmp_path: Path) -> None:
    patch = make.make_patch("v9", make_tree(tmp_path), HOOKS)
    assert patch.absent == (
        "megatron.training.elsewhere.anything",
        "megatron.training.training.of_a_later_version",
        "megatron.training.training.import_of_a_later_version",
    )
    assert len(patch.files) == 3


@pytest.mark.parametrize(
    "unreachable",
    [
        "def build(config):\n    from specs import block_spec\n",
        "def build(config):\n    def block_spec(): ...\n",
        "class Spec:\n    def block_spec(self): ...\n\n\ndef build(config): ...\n",
        "from specs import block_spec as spec\n\n\ndef build(config): ...\n",
    ],
)
def test_a_name_that_a_file_does_not_have_at_its_top_is_absent(tmp_path: Path, unreachable: str) -> None:
    tree = make_tree(tmp_path, FILES | {BUILDERS: unreachable.encode()})
    assert "builders.block_spec" in make.make_patch("v9", tree, HOOKS).absent


def test_a_name_that_is_imported_if_it_can_be_is_there(tmp_path: Path) -> None:
    source = b"try:\n    from specs import block_spec\nexcept ImportError:\n    pass\n\n\ndef build(config): ...\n"
    patch = make.make_patch("v9", make_tree(tmp_path, FILES | {BUILDERS: source}), HOOKS)
    assert patch.files[BUILDERS].insertions[0].line == 7


def test_git_and_patch_take_the_diff_too(tmp_path: Path) -> None:
    patches = make_patches(tmp_path / "patches")
    ours = make_tree(tmp_path / "ours")
    source_tree.apply(ours, patches)
    (ours / RECORD).unlink()
    assert_others_agree(ours, make_tree(tmp_path / "pristine"), patches / "v9.diff", tmp_path)


def assert_others_agree(ours: Path, pristine: Path, diff: Path, where: Path) -> None:
    """That `git apply` and `patch` make of `pristine` what we have made of it."""
    commands = {
        "git": ["git", "apply", "--unidiff-zero", diff],
        "patch": ["patch", "--binary", "-s", "-p1", "-i", diff],
    }
    for tool, command in commands.items():
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
        shutil.copytree(pristine, where / tool, symlinks=True)
        # Not as part of whatever repository lies above.
        subprocess.run(command, cwd=where / tool, check=True, env={**os.environ, "GIT_CEILING_DIRECTORIES": str(where)})
        # Of the modes, git keeps no more than whether a file can be executed.
        assert contents(where / tool) == contents(ours), tool


def contents(tree: Path) -> dict[str, bytes]:
    return {path: content for path, (content, _) in snapshot(tree).items()}


ENTRY = {
    "version": "1",
    "absent": [],
    "files": {"x": {"pristine": "2", "patched": "3", "anchors": [{"line": 2, "above": "f", "sha256": "1"}]}},
}
SOUND = "--- a/x\n+++ b/x\n@@ -1,0 +2,1 @@\n+ours\n"


def test_a_diff_and_its_entry_are_read_as_they_were_written() -> None:
    patch = SourcePatch.parse("v9", ENTRY, SOUND)
    assert patch.files["x"].insertions[0].added == ("ours",)
    assert (patch.entry(), patch.diff()) == (ENTRY, SOUND)


@pytest.mark.parametrize(
    "diff",
    [
        SOUND.replace("b/x", "b/y"),
        SOUND.replace("@@ -1,0 +2,1 @@", "@@ -1,1 +1,1 @@\n-theirs"),
        SOUND.replace("+2,1", "+2,2"),
        SOUND.replace("+2,1", "+2,2") + " theirs\n",
        SOUND + " theirs\n",
        SOUND + "@@ -8,0 +9,1 @@\n+unknown\n",
        "",
    ],
)
def test_a_diff_that_does_not_do_what_its_entry_knows_is_refused(diff: str) -> None:
    with pytest.raises((ValueError, KeyError)):
        SourcePatch.parse("v9", ENTRY, diff)


def test_what_is_not_the_file_that_was_meant_is_not_changed() -> None:
    file = make.make_file_patch(FILES[ARGUMENTS], HOOKS[:2])
    assert file.remove(file.insert(FILES[ARGUMENTS])) == FILES[ARGUMENTS]
    for change in (file.insert, file.remove):
        with pytest.raises(ValueError, match="the sha256 of the result is"):
            change(FILES[ARGUMENTS] + b"\n")


def test_line_numbers_that_python_counts_otherwise_are_noticed() -> None:
    with pytest.raises(ValueError, match="line 4 does not begin the definition of validate"):
        make.make_file_patch(b"# one\r" + FILES[ARGUMENTS], HOOKS[1:2])


def test_a_function_that_is_defined_twice_is_no_anchor() -> None:
    content = FILES[ARGUMENTS] + b"\ndef validate(args):\n    return None\n"
    with pytest.raises(ValueError, match="validate is defined 2 times"):
        make.make_file_patch(content, HOOKS[:2])


def test_a_long_binding_is_broken_as_megatron_lm_breaks_lines() -> None:
    name = "get_" + "long_" * 12 + "name"
    added = make.added_lines([hooks.Hook("m", name, "with_tied_layers", above="f")], first=False)
    assert added == [f"{name} = megatron_tied_hooks.with_tied_layers(", f"    {name}", ")", "", ""]


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("MAJOR = 0\nMINOR = 16\nPATCH = 1\nPRE_RELEASE = ''\n", "0.16.1"),
        ('MAJOR = 0\nMINOR = 17\nPATCH = 0\nPRE_RELEASE = "rc0"\n', "0.17.0rc0"),
        ("__version__ = '0.16.1'\n", None),
    ],
)
def test_the_version_is_read_without_running_the_file(text: str, version: str | None) -> None:
    assert stated_version(text) == version


def test_a_tree_is_patched_without_torch() -> None:
    code = "import sys; import megatron_tied.patching.source_tree; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"


@on_real_trees
@pytest.mark.parametrize("tag", TAGS)
def test_the_patch_of_a_real_tree_is_made_anew_as_stored(tag: str) -> None:
    assert make.make_patch(tag, Path(TREES, tag)) == STORED[tag], "run patches/make.py"


@on_real_trees
@pytest.mark.parametrize("tag", TAGS)
def test_a_real_tree_is_patched_checked_and_restored(tag: str, tmp_path: Path) -> None:
    pristine, ours = Path(TREES, tag), tmp_path / "ours"
    shutil.copytree(pristine, ours, symlinks=True)
    before = snapshot(ours)
    assert source_tree.apply(ours).patch == STORED[tag]
    assert source_tree.check(ours).is_patched
    for path in STORED[tag].files:
        compile((ours / path).read_bytes(), path, "exec")
    (ours / RECORD).rename(tmp_path / RECORD)
    assert_others_agree(ours, pristine, DIRECTORY / f"{tag}.diff", tmp_path)
    (tmp_path / RECORD).rename(ours / RECORD)
    source_tree.revert(ours)
    assert snapshot(ours) == before


@on_real_trees
@pytest.mark.parametrize("tag", TAGS)
def test_the_arguments_of_a_real_tree_list_the_flags(tag: str, tmp_path: Path) -> None:
    ours = tmp_path / "tree"
    shutil.copytree(Path(TREES, tag), ours, symlinks=True)
    source_tree.apply(ours)
    # The usage, not the help: some tags' own help has a lone % that argparse stops at.
    code = (
        "import argparse, sys; sys.path.insert(0, sys.argv[1])\n"
        "try: from megatron.training.arguments import add_megatron_arguments\n"
        "except ModuleNotFoundError as error: print(error); sys.exit(3)\n"
        "print(add_megatron_arguments(argparse.ArgumentParser()).format_usage())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, ours], check=False, capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip(f"{tag} cannot be imported here: {done.stdout.strip()}")
    assert done.returncode == 0, done.stderr
    assert [name for name in NAMES.values() if f"{flag(name)} " not in done.stdout] == []
