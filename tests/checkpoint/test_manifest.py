"""A manifest says what is wrong with a checkpoint, and which file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_tied.checkpoint.manifest import NAME, BrokenCheckpointError, Chunk, File, Manifest, Tensor, sha256
from tests.checkpoint.cuts import SHAPES, Box, place, tilings


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


@st.composite
def coverings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape, and rectangles that may cover it once: a tiling, of which some are left out, doubled or moved."""
    shape = draw(SHAPES)
    boxes: list[Box] = []
    for offsets, sizes in draw(tilings(shape)):
        moves = draw(st.sampled_from([[0], [0], [0], [0, 0], [], [1]]))
        boxes += [(tuple(min(o + move, 5) for o in offsets), sizes) for move in moves]
    return shape, boxes


@given(coverings())
def test_a_tensor_is_covered_once_or_not(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = case
    counted = torch.zeros([size + 10 for size in shape], dtype=torch.int64)
    for offsets, sizes in boxes:
        counted[place(offsets, sizes)] += 1
    expected = torch.zeros_like(counted)
    expected[place((0,) * len(shape), shape)] = 1
    tensor = Tensor("float32", list(shape), [Chunk("file", list(offsets), list(sizes)) for offsets, sizes in boxes])
    assert tensor.is_covered_once() == torch.equal(counted, expected)


def test_what_covers_a_tensor_may_be_empty_in_part() -> None:
    chunks = [Chunk("file", [0, 0], [2, 0]), Chunk("file", [0, 0], [2, 3]), Chunk("file", [1, 3], [0, 9])]
    assert Tensor("float32", [2, 3], chunks).is_covered_once()
    assert Tensor("float32", [0, 3], chunks[:1]).is_covered_once()
    assert not Tensor("float32", [], []).is_covered_once()
