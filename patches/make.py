"""Makes the source patches from `megatron_tied.megatron_lm.hooks.HOOKS` and pristine trees of Megatron-LM.

    python patches/make.py --tree core_v0.16.1=DIR [--tree TAG=DIR ...] [--output patches]

Tags that are not named keep what they have.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from megatron_tied.files import write_whole
from megatron_tied.megatron_lm.hooks import HOOKS, Hook
from megatron_tied.patching.source_patch import (
    TREES,
    VERSION_FILE,
    FilePatch,
    Insertion,
    SourcePatch,
    digest,
    inserted,
    line_digest,
    stated_version,
)

ALIAS = "megatron_tied_hooks"
_HEAD = (
    "# Added by `megatron-tied patch`; its `--revert` takes it out again.",
    f"from megatron_tied.megatron_lm import hooks as {ALIAS}",
)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_WIDTH = 100  # of Megatron-LM's lines


def anchor_of(hook: Hook) -> str:
    """The function whose definition the hook's lines stand above."""
    return hook.above or hook.name


def path_of(hook: Hook) -> str:
    """The file that the hook is for, from the root of a tree."""
    return f"{hook.module.replace('.', '/')}.py"


def added_lines(hooks: Sequence[Hook], first: bool) -> list[str]:
    """What stands above one function for `hooks`; the `first` insertion of a file imports them."""
    bindings = [line for hook in hooks if hook.above for line in _binding(hook)]
    lines = [*_HEAD] if first else []
    if first and bindings:
        lines.append("")
    lines += bindings
    if lines:
        lines += ["", ""]
    return lines + [f"@{ALIAS}.{hook.wrapper}" for hook in hooks if not hook.above]


def make_file_patch(content: bytes, hooks: Sequence[Hook]) -> FilePatch:
    """The patch of one pristine file for `hooks`, all of which it has. Raises ValueError for an unclear anchor."""
    module = ast.parse(content)
    lines = content.split(b"\n")
    places = {name: _first_line(module, name) for name in map(anchor_of, hooks)}
    insertions: list[Insertion] = []
    for name, line in sorted(places.items(), key=lambda place: place[1]):
        if not re.match(rb"(async )?def |@", lines[line - 1]):
            raise ValueError(f"line {line} does not begin the definition of {name}")
        added = added_lines([hook for hook in hooks if anchor_of(hook) == name], first=not insertions)
        insertions.append(Insertion(line, name, line_digest(lines[line - 1]), tuple(added)))
    patched = inserted(content, tuple(insertions))
    return FilePatch(digest(content), digest(patched), tuple(insertions))


def make_patch(tag: str, tree: Path, hooks: Sequence[Hook] = HOOKS) -> SourcePatch:
    """The patch for the pristine `tree` of `tag`. A hook whose function the tag does not have is noted as absent."""
    version = stated_version((tree / VERSION_FILE).read_text(encoding="utf-8"))
    if version is None:
        raise ValueError(f"{tree / VERSION_FILE} states no version")
    files, absent = {}, []
    for path, of_path in groupby(sorted(hooks, key=path_of), key=path_of):
        content = (tree / path).read_bytes() if (tree / path).is_file() else b""
        names = _names(ast.parse(content))
        present = []
        for hook in of_path:
            if {hook.name, anchor_of(hook)} <= names:
                present.append(hook)
            else:
                absent.append(f"{hook.module}.{hook.name}")
        if present:
            files[path] = make_file_patch(content, present)
    return SourcePatch(tag, version, files, tuple(absent))


def store(patches: Sequence[SourcePatch], directory: Path) -> None:
    """Write the diffs of `patches` and their entries into `directory`."""
    trees = directory / TREES
    entries = json.loads(trees.read_text(encoding="utf-8")) if trees.exists() else {}
    for patch in patches:
        write_whole(directory / f"{patch.tag}.diff", patch.diff())
        entries[patch.tag] = patch.entry()
    write_whole(trees, json.dumps(dict(sorted(entries.items())), indent=1) + "\n")


def _binding(hook: Hook) -> list[str]:
    line = f"{hook.name} = {ALIAS}.{hook.wrapper}({hook.name})"
    if len(line) <= _WIDTH:
        return [line]
    return [f"{hook.name} = {ALIAS}.{hook.wrapper}(", f"    {hook.name}", ")"]


def _first_line(module: ast.Module, name: str) -> int:
    """The line of the function's definition, or of its first decorator: ours are to be the outermost."""
    definitions = [node for node in module.body if isinstance(node, _FUNCTIONS) and node.name == name]
    if len(definitions) != 1:
        raise ValueError(f"{name} is defined {len(definitions)} times, not once")
    return min(node.lineno for node in (definitions[0], *definitions[0].decorator_list))


def _names(block: ast.AST) -> set[str]:
    """What a file defines or imports at its top level, also in a `try` or an `if`."""
    names = set()
    for node in ast.iter_child_nodes(block):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, _FUNCTIONS):
            names.add(node.name)
        elif not isinstance(node, ast.ClassDef):
            names |= _names(node)
    return names


def _tree(text: str) -> tuple[str, Path]:
    tag, equals, directory = text.partition("=")
    if not equals or not (Path(directory) / VERSION_FILE).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} must be TAG=DIR, the tag's pristine tree")
    return tag, Path(directory)


def main() -> None:
    """Make the patches that the command line asks for, and tell what they do not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tree", type=_tree, action="append", required=True, metavar="TAG=DIR", dest="trees")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent, metavar="DIR")
    args = parser.parse_args()
    patches = [make_patch(tag, tree) for tag, tree in args.trees]
    store(patches, args.output)
    for patch in patches:
        print(f"{patch.tag}: {len(patch.files)} files; not in this tag: {', '.join(patch.absent) or 'nothing'}")


if __name__ == "__main__":
    main()
