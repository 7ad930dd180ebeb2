"""A source patch: lines of ours above certain lines of certain files, and the digests that tell those files.

Stored as a diff without context, which `git apply --unidiff-zero` and `patch -p1` take too, and a JSON entry with what
a diff cannot say: the sha256 of every file before and after, and of every line that something is inserted above.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

TREES = "trees.json"
# Megatron-LM's own statement of its version, which is not always that of its tag.
VERSION_FILE = "megatron/core/package_info.py"
_HUNK = re.compile(r"@@ -(\d+),0 \+(\d+),(\d+) @@")


def digest(content: bytes) -> str:
    """The sha256 of `content`."""
    return sha256(content).hexdigest()


def line_digest(line: bytes) -> str:
    """The sha256 of a line, whatever its line ending."""
    return digest(line.rstrip(b"\r\n"))


@dataclass(frozen=True)
class Insertion:
    """Lines `added` above line number `line` (from 1) of a pristine file.

    above, anchor: the function that is defined there, and the `line_digest` of that line.
    """

    line: int
    above: str
    anchor: str
    added: tuple[str, ...]

    def lines_with_anchor(self, content: bytes) -> list[int]:
        """The numbers of the lines of `content` that are the anchor."""
        return [n for n, line in enumerate(content.split(b"\n"), 1) if line_digest(line) == self.anchor]


@dataclass(frozen=True)
class FilePatch:
    """What happens to one file: its digests before and after, and the insertions, first to last."""

    pristine: str
    patched: str
    insertions: tuple[Insertion, ...]

    def insert(self, content: bytes) -> bytes:
        """The pristine `content` with our lines. Raises ValueError if that is not the file that was meant."""
        return self._verified(inserted(content, self.insertions), self.patched)

    def remove(self, content: bytes) -> bytes:
        """The patched `content` without our lines. Raises ValueError if that is not the file that was meant."""
        lines = content.split(b"\n")
        for insertion in self.insertions:
            del lines[insertion.line - 1 : insertion.line - 1 + len(insertion.added)]
        return self._verified(b"\n".join(lines), self.pristine)

    @staticmethod
    def _verified(content: bytes, expected: str) -> bytes:
        if digest(content) != expected:
            raise ValueError(f"the sha256 of the result is {digest(content)}, not {expected}")
        return content


@dataclass(frozen=True)
class SourcePatch:
    """The patch for one tag of Megatron-LM, whose trees say that they are `version`.

    absent: the hooks of the description that the tag has no function for, as `module.name`.
    """

    tag: str
    version: str
    files: Mapping[str, FilePatch]
    absent: tuple[str, ...] = ()

    def diff(self) -> str:
        """The patch as a unified diff without context."""
        return "".join(f"{line}\n" for path, file in self.files.items() for line in _diff_lines(path, file))

    def entry(self) -> dict[str, Any]:
        """What the diff does not say, in JSON types."""
        return {
            "version": self.version,
            "absent": list(self.absent),
            "files": {path: _file_entry(file) for path, file in self.files.items()},
        }

    @classmethod
    def parse(cls, tag: str, entry: Mapping[str, Any], diff: str) -> SourcePatch:
        """The inverse of `diff` and `entry`. Raises ValueError, KeyError or TypeError for anything else."""
        added = dict(_hunks(diff))
        files = {path: _file_patch(path, file, added) for path, file in entry["files"].items()}
        if added:
            raise ValueError(f"nothing is known of the hunks at {sorted(added)}")
        return cls(tag, entry["version"], files, tuple(entry["absent"]))


def inserted(content: bytes, insertions: tuple[Insertion, ...]) -> bytes:
    """`content` with the lines of all `insertions`; every other byte stays, line endings too."""
    lines = content.split(b"\n")
    for insertion in reversed(insertions):
        lines[insertion.line - 1 : insertion.line - 1] = [line.encode() for line in insertion.added]
    return b"\n".join(lines)


def stored_patches(directory: Path | None = None) -> list[SourcePatch]:
    """The patches in `directory`; by default, those that come with this package."""
    directory = directory or _shipped()
    trees = json.loads((directory / TREES).read_text(encoding="utf-8"))
    return [
        SourcePatch.parse(tag, entry, (directory / f"{tag}.diff").read_text(encoding="utf-8"))
        for tag, entry in trees.items()
    ]


def stated_version(text: str) -> str | None:
    """The version that the text of `VERSION_FILE` states, such as 0.16.1 or 0.17.0rc0; None if it states none."""
    names = ("MAJOR", "MINOR", "PATCH")
    found = (re.search(rf"^{name} = (\d+)$", text, re.MULTILINE) for name in names)
    parts = [match[1] for match in found if match]
    if len(parts) < len(names):
        return None
    pre_release = re.search(r"^PRE_RELEASE = ['\"](.*)['\"]$", text, re.MULTILINE)
    return ".".join(parts) + (pre_release[1] if pre_release else "")


def _shipped() -> Path:
    # A wheel puts them inside the package, a checkout keeps them at its top.
    package = Path(__file__).resolve().parents[1]
    inside = package / "patches"
    return inside if inside.is_dir() else package.parent / "patches"


def _diff_lines(path: str, file: FilePatch) -> Iterator[str]:
    yield f"--- a/{path}"
    yield f"+++ b/{path}"
    shift = 0
    for insertion in file.insertions:
        yield f"@@ -{insertion.line - 1},0 +{insertion.line + shift},{len(insertion.added)} @@"
        yield from (f"+{line}" for line in insertion.added)
        shift += len(insertion.added)


def _hunks(diff: str) -> Iterator[tuple[tuple[str, int], tuple[str, ...]]]:
    """For each hunk, its file and line number, and what it adds."""
    lines = iter(diff.splitlines())
    path = ""
    for line in lines:
        if line.startswith("--- a/") and next(lines, None) == f"+++ b/{line[6:]}":
            path = line[6:]
        elif hunk := _HUNK.fullmatch(line):
            added = [next(lines, "") for _ in range(int(hunk[3]))]
            if not all(text.startswith("+") for text in added):
                raise ValueError(f"{path}: the hunk {line} does more than add {hunk[3]} lines")
            yield (path, int(hunk[1]) + 1), tuple(text[1:] for text in added)
        else:
            raise ValueError(f"{line!r} has no place in a patch of additions only")


def _file_entry(file: FilePatch) -> dict[str, Any]:
    anchors = [{"line": each.line, "above": each.above, "sha256": each.anchor} for each in file.insertions]
    return {"pristine": file.pristine, "patched": file.patched, "anchors": anchors}


def _file_patch(path: str, entry: Mapping[str, Any], added: dict[tuple[str, int], tuple[str, ...]]) -> FilePatch:
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError(f"{path} lies outside of the tree")
    insertions = [
        Insertion(anchor["line"], anchor["above"], anchor["sha256"], added.pop((path, anchor["line"])))
        for anchor in entry["anchors"]
    ]
    return FilePatch(entry["pristine"], entry["patched"], tuple(insertions))
