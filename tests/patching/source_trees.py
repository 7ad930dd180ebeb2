"""Small trees of our own that look like Megatron-LM to the source patches, and the patches for them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_tied.errors import ConfigError
from megatron_tied.megatron_lm.hooks import Hook
from megatron_tied.patching.source_patch import VERSION_FILE
from patches import make

ARGUMENTS = "megatron/training/arguments.py"
BUILDERS = "builders.py"
TRAINING = "megatron/training/training.py"

HOOKS = (
    Hook("megatron.training.arguments", "add_flags", "with_tie_arguments"),
    Hook("megatron.training.arguments", "validate", "with_tie_checks"),
    Hook("builders", "block_spec", "with_tied_layers", above="build"),
    Hook("megatron.training.training", "get_model", "with_tied_chunks"),
    Hook("megatron.training.training", "finalize", "with_bank_copies_summed", above="get_model"),
    Hook("megatron.training.elsewhere", "anything", "with_tied_chunks"),
    Hook("megatron.training.training", "of_a_later_version", "with_tied_chunks"),
    Hook("megatron.training.training", "import_of_a_later_version", "with_tied_chunks", above="get_model"),
)

FILES = {
    VERSION_FILE: b"MAJOR = 9\nMINOR = 8\nPATCH = 7\nPRE_RELEASE = ''\n",
    ARGUMENTS: (
        b"import argparse\n\ndef validate(args):\n    return args\n\n"
        b"def add_flags(\n    parser,\n):\n    return parser\n\n"
        b"def parser():\n    return add_flags(argparse.ArgumentParser())\n"
    ),
    # Line endings of another system, and none at the end.
    BUILDERS: b"from specs import block_spec\r\n\r\n\r\ndef build(config):\r\n    return block_spec(config)",
    TRAINING: (
        b"from functools import (\n    cache,\n    partial as finalize,\n)\n\n\n"
        b"@cache\n@finalize(\n    print,\n)\ndef get_model(provider):\n    return provider()\n"
    ),
}


def make_tree(root: Path, files: dict[str, bytes] = FILES) -> Path:
    """Writes `files` under `root` and returns it."""
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def make_patches(directory: Path, hooks: tuple[Hook, ...] = HOOKS, **tags: dict[str, bytes]) -> Path:
    """Stores patches for `tags`, by default for one with the tree of `FILES`, in `directory` and returns it."""
    directory.mkdir(exist_ok=True)
    trees = {tag: make_tree(directory / f"{tag}.tree", files) for tag, files in (tags or {"v9": FILES}).items()}
    make.store([make.make_patch(tag, tree, hooks) for tag, tree in trees.items()], directory)
    return directory


def snapshot(tree: Path) -> dict[str, tuple[bytes, int]]:
    """Every file in `tree`, with its bytes and its mode."""
    paths = [Path(parent, name) for parent, _, names in os.walk(tree) for name in names]
    return {str(path.relative_to(tree)): (path.read_bytes(), path.lstat().st_mode) for path in paths}


def refused(action: Callable, tree: Path, patches: Path) -> list[str]:
    """The problems that `action` finds; that it changes nothing is checked here."""
    before = snapshot(tree)
    with pytest.raises(ConfigError) as error:
        action(tree, patches)
    assert snapshot(tree) == before
    return [str(problem) for problem in error.value.problems]


def interrupted(action: Callable, tree: Path, patches: Path, at: int) -> str:
    """What `action` says when its rename number `at` (from 0) finds the disk gone."""
    replace, calls = os.replace, iter(range(9))

    def failing(source: Path, target: Path) -> None:
        if next(calls) == at:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(ConfigError) as error:
            action(tree, patches)
    return str(error.value)
