"""What of a checkout a build sees."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from docker.utils.build import exclude_paths

from tests.docker.dockerfile import DOCKERFILES, ROOT, Dockerfile

# What a checkout gathers, or what somebody drops in it.
STRAY = (
    ".git/config",
    ".venv/bin/python",
    ".env",
    "id_ed25519",
    "build/lib/megatron_tied/old.py",
    "megatron_tied/layers/__pycache__/banks.cpython-311.pyc",
    "runs/quickstart/run/checkpoints/latest",
    "shared/notes.md",
)


def ignore_file(dockerfile: Path) -> Path:
    """BuildKit takes the file beside a Dockerfile before one at the top of the context."""
    return dockerfile.with_name(f"{dockerfile.name}.dockerignore")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Empty files of the names that git knows, and strays."""
    directory = tmp_path_factory.mktemp("checkout")
    known = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    for name in (*known.splitlines(), *STRAY):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return directory


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_build_sees_what_it_copies_and_nothing_else(path: Path, checkout: Path) -> None:
    patterns = [line for line in ignore_file(path).read_text().splitlines() if line and not line.startswith("#")]
    seen = {name for name in exclude_paths(str(checkout), patterns) if (checkout / name).is_file()}
    wanted = set()
    for source in Dockerfile.read(path).copied():
        there = checkout / source
        wanted |= {file for file in there.rglob("*") if file.is_file()} if there.is_dir() else {there}
    expected = {str(file.relative_to(checkout)) for file in wanted} - set(STRAY)
    # The library adds the Dockerfile itself: the engine is sent it, too.
    assert seen - {"Dockerfile"} == expected
    assert "megatron_tied/pretrain.py" in seen


def test_both_builds_see_the_same() -> None:
    gpu, cpu = (ignore_file(path).read_text() for path in DOCKERFILES)
    assert gpu == cpu
