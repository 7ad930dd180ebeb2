"""Puts the source patch into a Megatron-LM tree, checks it, and takes it out: byte for byte, and all or nothing.

A file is told by its sha256 alone: pristine, patched or changed. So an interrupted run can be finished or undone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.files import sync
from megatron_tied.patching.source_patch import (
    VERSION_FILE,
    FilePatch,
    SourcePatch,
    digest,
    stated_version,
    stored_patches,
)
from megatron_tied.patching.source_record import RECORD, Record

_FIELD = "--megatron-lm"
_LAUNCHER = "Without a patch: python -m megatron_tied.megatron_lm pretrain_gpt.py ..."
# A tree is Megatron-LM, and not Megatron-Core alone, by having both.
_LANDMARKS = (VERSION_FILE, "megatron/training/arguments.py")


class State(StrEnum):
    """What a file is to a patch."""

    PRISTINE = "pristine"
    PATCHED = "patched"
    CHANGED = "changed"
    MISSING = "missing"


@dataclass(frozen=True)
class TreeReport:
    """What was found in a tree, or made of it: the state of every file that its patch touches.

    record: what the tree itself knows of its patch, if anything.
    outdated: the tree carries the patch of another version of megatron-tied.
    """

    tree: Path
    patch: SourcePatch
    states: Mapping[str, State]
    record: Record | None = None
    outdated: bool = False

    @property
    def is_patched(self) -> bool:
        """Whether every file is exactly as the patch leaves it."""
        return set(self.states.values()) == {State.PATCHED}

    @property
    def is_pristine(self) -> bool:
        """Whether every file is exactly as the tag has it."""
        return set(self.states.values()) == {State.PRISTINE}

    def files_that_are(self, *states: State) -> list[str]:
        """The files in one of these states."""
        return [path for path, state in self.states.items() if state in states]

    def lines(self) -> list[str]:
        """For people: what the tree is, then one line for each file."""
        width = max(map(len, self.states))
        return [
            f"{self.tree}: {self._summary()}",
            *(f"  {path:{width}}  {state}" for path, state in self.states.items()),
        ]

    def _summary(self) -> str:
        if self.is_patched:
            renew = "; this version has another patch: --revert, then patch again" if self.outdated else ""
            return f"patched for {self.patch.tag}, {_by(self.record)}{renew}"
        if self.is_pristine:
            return f"not patched; the patch for {self.patch.tag} would apply"
        if self.files_that_are(State.CHANGED, State.MISSING):
            way = "restore them, or take the lines of megatron_tied_hooks out by hand"
            told = f"{way}; --revert is refused" if self.files_that_are(State.PATCHED) else "the patch would not apply"
            return f"files differ from {self.patch.tag}: {told}"
        return f"patched in part for {self.patch.tag}: patch again to complete it, or --revert"


def apply(tree: Path, patches: Path | None = None) -> TreeReport:
    """Patch `tree`, or complete what was interrupted.

    patches: the directory of the patches; by default, of those that come with this package. Raises ConfigError, and
    changes nothing, for a tree that is patched already, unknown, or not as its tag has it.
    """
    found = _look(tree, patches)
    if found.is_patched:
        valid = f"is already patched (for {found.patch.tag}, {_by(found.record)}): use --check or --revert"
        raise ConfigError(Problem(_FIELD, str(tree), valid))
    if found.files_that_are(State.CHANGED, State.MISSING):
        raise ConfigError(_differences(found))
    if found.outdated:
        valid = f"is patched in part, {_by(found.record)}, whose patch was another: --revert, then patch again"
        raise ConfigError(Problem(_FIELD, str(tree), valid))
    record = Record.of_today(found.patch)
    files = found.patch.files
    todo = {path: files[path].insert((tree / path).read_bytes()) for path in found.files_that_are(State.PRISTINE)}
    _replace(found, todo, record)
    return TreeReport(tree, found.patch, dict.fromkeys(found.states, State.PATCHED), record)


def check(tree: Path, patches: Path | None = None) -> TreeReport:
    """What state `tree` is in. Raises ConfigError for one that no patch is known for."""
    return _look(tree, patches)


def revert(tree: Path, patches: Path | None = None) -> TreeReport:
    """Take our lines out of `tree`, and the record with them.

    Raises ConfigError, and changes nothing, if there is nothing to take out or a file is not as the patch left it.
    """
    found = _look(tree, patches)
    if found.is_pristine and found.record is None:
        raise ConfigError(Problem(_FIELD, str(tree), f"is not patched: it is {found.patch.tag} as released"))
    if found.files_that_are(State.CHANGED, State.MISSING):
        raise ConfigError(_differences(found))
    files = found.patch.files
    todo = {path: files[path].remove((tree / path).read_bytes()) for path in found.files_that_are(State.PATCHED)}
    _replace(found, todo)
    # Last: until here it tells what was to be undone.
    (tree / RECORD).unlink(missing_ok=True)
    return TreeReport(tree, found.patch, dict.fromkeys(found.states, State.PRISTINE))


def _look(tree: Path, directory: Path | None) -> TreeReport:
    with _told_as("cannot be read", "nothing was changed"):
        return _matched(tree, directory)


def _matched(tree: Path, directory: Path | None) -> TreeReport:
    """The tree beside the patch it carries, or beside the one that would fit it best."""
    if missing := [path for path in _LANDMARKS if not (tree / path).is_file()]:
        valid = f"must be the root of a Megatron-LM tree: it has no {' and no '.join(missing)}"
        raise ConfigError(Problem(_FIELD, str(tree), valid))
    patches = stored_patches(directory)
    record = Record.read(tree)
    if record is not None:
        states = _states(tree, record.patch)
        if State.PATCHED in states.values():
            outdated = all(record.patch.files != patch.files for patch in patches)
            return TreeReport(tree, record.patch, states, record, outdated)
    # A record of which nothing is left in the files: they have been restored, or another tag was checked out.
    version = stated_version((tree / VERSION_FILE).read_text(encoding="utf-8", errors="replace"))
    known = [TreeReport(tree, patch, _states(tree, patch), record) for patch in patches if patch.version == version]
    if not known:
        tags = ", ".join(f"{patch.tag} (states {patch.version})" for patch in patches)
        valid = f"states version {version}; there are patches for {tags}. {_LAUNCHER}"
        raise ConfigError(Problem(_FIELD, str(tree), valid))
    return max(known, key=lambda report: len(report.files_that_are(State.PRISTINE, State.PATCHED)))


def _states(tree: Path, patch: SourcePatch) -> dict[str, State]:
    return {path: _state(tree / path, file) for path, file in patch.files.items()}


def _state(path: Path, file: FilePatch) -> State:
    if not path.is_file():
        return State.MISSING
    # To replace a link would leave a tree that cannot be told from one whose link the user has replaced.
    if path.is_symlink():
        return State.CHANGED
    known = {file.pristine: State.PRISTINE, file.patched: State.PATCHED}
    return known.get(digest(path.read_bytes()), State.CHANGED)


def _differences(found: TreeReport) -> Iterator[Problem]:
    """The tree, and each file that is not as it should be."""
    tag = found.patch.tag
    if found.files_that_are(State.PATCHED):
        valid = f"is patched for {tag}, {_by(found.record)}, but has been changed since: nothing was done"
    else:
        valid = (
            f"is a dirty tree: it states the version of {tag}, but is not as released. Nothing was done. {_LAUNCHER}"
        )
    yield Problem(_FIELD, str(found.tree), valid)
    for path in found.files_that_are(State.CHANGED, State.MISSING):
        yield Problem(path, str(found.states[path]), f"must be as in {tag}{_explained(found, path)}")


def _explained(found: TreeReport, path: str) -> str:
    """What has become of the lines that something is to be inserted above."""
    file = found.tree / path
    if found.states[path] is State.MISSING:
        return ""
    if file.is_symlink():
        return ": it is a link"
    if found.files_that_are(State.PATCHED):
        return ", with the patch's lines and no other change"
    moved = []
    for insertion in found.patch.files[path].insertions:
        lines = insertion.lines_with_anchor(file.read_bytes())
        if not lines:
            moved.append(f"`{insertion.above}`, line {insertion.line}, has vanished or is defined otherwise")
        elif lines != [insertion.line]:
            moved.append(f"`{insertion.above}` has moved from line {insertion.line} to {', '.join(map(str, lines))}")
    return f": {'; '.join(moved)}" if moved else ": its anchors are in place, other lines differ"


def _by(record: Record | None) -> str:
    return f"by megatron-tied {record.by} on {record.date}" if record else f"with no {RECORD}"


def _replace(found: TreeReport, contents: Mapping[str, bytes], record: Record | None = None) -> None:
    """Make these the contents of files of the tree: none until all are on disk, then each in one step."""
    tree = found.tree
    try:
        with _told_as("cannot be written", "nothing was changed"):
            for path, content in contents.items():
                _stage(tree / path, content)
            if record is not None:
                record.write(tree)
        with _told_as("may be written in part", "run the same command again, or --revert"):
            for path in contents:
                os.replace(_staging(tree / path), tree / path)
            for directory in {(tree / path).parent for path in contents}:
                sync(directory)
    finally:
        # Of all files: a run that was killed may have left others.
        for path in found.states:
            _staging(tree / path).unlink(missing_ok=True)


@contextmanager
def _told_as(what: str, now: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = error.filename or "the tree"
        raise ConfigError(Problem(_FIELD, str(where), f"{what} ({error.strerror}): {now}")) from error


def _staging(path: Path) -> Path:
    return path.with_name(f".{path.name}.megatron_tied")


def _stage(path: Path, content: bytes) -> None:
    """Put `content`, with the mode and, where allowed, the owner of the file `path`, beside it."""
    staging = _staging(path)
    staging.write_bytes(content)
    owner = path.stat()
    with suppress(PermissionError):
        os.chown(staging, owner.st_uid, owner.st_gid)
    shutil.copymode(path, staging)
    sync(staging)
