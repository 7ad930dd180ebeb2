"""A manifest says what is wrong with a checkpoint, and which file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_tied.checkpoint.manifest import NAME, BrokenCheckpointError, Chunk, File, Manifest, Tensor, sha256


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    (tmp_path / "rank_00000.safetensors").write_bytes(b"12345")
    path = tmp_path / "rank_00000.safetensors"
    made = Manifest(
        step=7,
        consumed_samples=56,
        world_size=2,
        software="test",
        run={"train": {"steps": 20}},
        trainer={"schedule": 7},
        files={path.name: File(5, sha256(path))},
        tensors={"weight/w": Tensor("float32", [2, 3], [Chunk(path.name, [0, 0], [2, 3])])},
    )
    made.write(tmp_path)
    return made


def change(directory: Path, **values: Any) -> None:
    path = directory / NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def check_all(directory: Path) -> None:
    manifest = Manifest.read(directory)
    manifest.check_presence(directory)
    for name in manifest.files:
        manifest.check_file(directory, name)


def broken(directory: Path) -> str:
    """What is said about the checkpoint in `directory` when everything is checked."""
    with pytest.raises(BrokenCheckpointError) as error:
        check_all(directory)
    return str(error.value).replace(f"{directory}/", "")


def test_it_is_read_as_written(manifest: Manifest, tmp_path: Path) -> None:
    assert Manifest.read(tmp_path) == manifest
    check_all(tmp_path)


def test_damaged_files(manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "rank_00000.safetensors"
    path.write_bytes(b"12355")
    assert broken(tmp_path) == "rank_00000.safetensors: is damaged: its content does not match its checksum"
    path.write_bytes(b"123")
    assert broken(tmp_path) == "rank_00000.safetensors: is truncated: 3 bytes instead of 5"
    path.write_bytes(b"123456")
    assert broken(tmp_path) == "rank_00000.safetensors: is too long: 6 bytes instead of 5"
    path.unlink()
    assert broken(tmp_path) == "rank_00000.safetensors: is missing: No such file or directory"


def test_other_formats(manifest: Manifest, tmp_path: Path) -> None:
    change(tmp_path, format=2)
    assert broken(tmp_path) == f"{NAME}: is of format 2, of a newer version of this software; this one reads 1"
    change(tmp_path, format=0)
    assert broken(tmp_path) == f"{NAME}: is of format 0, of an older version of this software; this one reads 1"
    change(tmp_path, format=None)
    assert broken(tmp_path) == f"{NAME}: is no manifest of a checkpoint"


def test_a_changed_manifest(manifest: Manifest, tmp_path: Path) -> None:
    change(tmp_path, step=8)
    assert broken(tmp_path) == f"{NAME}: is damaged: it does not match its own checksum"
    (tmp_path / NAME).write_text('{"format": 1, "st')
    assert broken(tmp_path).startswith(f"{NAME}: cannot be read: Unterminated string")
    (tmp_path / NAME).unlink()
    assert broken(tmp_path).endswith(f"is no complete checkpoint: it has no {NAME}")
    assert broken(tmp_path / "nowhere").endswith("is no directory")
