"""A tree of our own, and the patches for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.patching.source_trees import make_patches, make_tree


@pytest.fixture
def patches(tmp_path: Path) -> Path:
    return make_patches(tmp_path / "patches")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "tree")
