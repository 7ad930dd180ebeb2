"""What is written in one way of cutting is read in any other, and only what is whole becomes a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_tied.checkpoint import storage
from megatron_tied.checkpoint.manifest import BrokenCheckpointError, Chunk, Manifest, Tensor
from megatron_tied.checkpoint.rectangles import Rectangles, StateDict
from megatron_tied.checkpoint.storage import completed, read, write
from tests.checkpoint.cuts import SHAPES, Box, place, tilings

EMPTY = Manifest(step=1, consumed_samples=1, world_size=2, software="test", run={}, trainer={})


def cut(whole: torch.Tensor, boxes: list[Box]) -> Rectangles:
    rectangles = Rectangles(whole.shape)
    for offsets, sizes in boxes:
        rectangles.add(offsets, whole[place(offsets, sizes)])
    return rectangles


def written(directory: Path, *of_ranks: StateDict) -> list[Any]:
    """What the ranks tell of their files, as it arrives."""
    return json.loads(json.dumps([write(directory, rank, tensors) for rank, tensors in enumerate(of_ranks)]))


def saved(directory: Path, *of_ranks: StateDict) -> Manifest:
    return completed(EMPTY, written(directory, *of_ranks), frozenset())


@st.composite
def savings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[list[Box]], list[Box]]:
    """A shape, how three ranks hold it (one may hold nothing), and how it is wanted."""
    shape = draw(SHAPES)
    held: list[list[Box]] = [[], [], []]
    for box in draw(tilings(shape)):
        held[draw(st.integers(0, 2))].append(box)
    return shape, held, draw(tilings(shape))


@given(savings())
def test_a_tensor_comes_back_however_it_is_cut(case: tuple[tuple[int, ...], list[list[Box]], list[Box]]) -> None:
    shape, held, wanted = case
    whole = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    found = torch.full(shape, -1.0)
    with tempfile.TemporaryDirectory() as directory:
        manifest = saved(Path(directory), *({"w": cut(whole, boxes)} if boxes else {} for boxes in held))
        assert manifest.files.keys() == {f"rank_{rank:05d}.safetensors" for rank, boxes in enumerate(held) if boxes}
        read(Path(directory), manifest, {"w": cut(found, wanted)})
    assert torch.equal(found, whole)


def test_a_part_is_read_into_its_place_and_nothing_else_changes(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    manifest = saved(tmp_path, {"w": cut(whole, [((0, 0), (2, 6)), ((2, 0), (2, 6))])})
    found = torch.full((4, 6), -1.0)
    read(tmp_path, manifest, {"w": cut(found, [((1, 2), (2, 3))])})
    assert torch.equal(found[1:3, 2:5], whole[1:3, 2:5])
    assert (found == -1).sum() == 24 - 6


def test_values_of_any_kind(tmp_path: Path) -> None:
    values = {
        "nan": torch.tensor([1.0, math.nan, -math.inf]),
        "bf16": torch.tensor([[1.5], [2.5]], dtype=torch.bfloat16),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "columns": torch.arange(6.0).view(2, 3).t(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    manifest = saved(tmp_path, values)
    assert manifest.tensors["scalar"] == Tensor("int64", [], [Chunk("rank_00000.safetensors", [], [])])
    found = {name: torch.zeros_like(value) for name, value in values.items()}
    found["parameter"] = torch.nn.Parameter(torch.zeros(2))
    read(tmp_path, manifest, found)
    for name, value in values.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)
    # A model of another precision takes them in its own.
    other = {"bf16": torch.zeros(2, 1, dtype=torch.float64)}
    read(tmp_path, manifest, other)
    assert other["bf16"].tolist() == [[1.5], [2.5]]


def test_only_the_files_that_are_needed_are_opened(tmp_path: Path) -> None:
    whole = torch.arange(8.0)
    manifest = saved(tmp_path, {"w": cut(whole, [((0,), (4,))])}, {"w": cut(whole, [((4,), (4,))])})
    (tmp_path / "rank_00001.safetensors").unlink()
    found = torch.zeros(8)
    read(tmp_path, manifest, {"w": cut(found, [((1,), (3,))])})
    assert found.tolist() == [0, 1, 2, 3, 0, 0, 0, 0]
    with pytest.raises(BrokenCheckpointError, match=r"rank_00001.safetensors: cannot be read: No such file"):
        read(tmp_path, manifest, {"w": cut(found, [((3,), (2,))])})
    (tmp_path / "rank_00001.safetensors").write_bytes(b"no safetensors file")
    with pytest.raises(BrokenCheckpointError, match=r"rank_00001.safetensors: cannot be read: "):
        read(tmp_path, manifest, {"w": cut(found, [((3,), (2,))])})


def test_what_is_not_there_is_not_loaded(tmp_path: Path) -> None:
    manifest = saved(tmp_path, {"w": torch.arange(6.0).view(2, 3)})
    with pytest.raises(BrokenCheckpointError, match=f"^{tmp_path}: does not hold all of v$"):
        read(tmp_path, manifest, {"v": torch.zeros(2, 3)})
    with pytest.raises(BrokenCheckpointError, match=r"holds w as \[2, 3\], not as \[3, 2\]$"):
        read(tmp_path, manifest, {"w": torch.zeros(3, 2)})
    # Broadcast it would have filled the place.
    with pytest.raises(BrokenCheckpointError, match=r"holds w as \[2, 3\], not as \[4, 3\]$"):
        read(tmp_path, manifest, {"w": torch.zeros(4, 3)})
    in_part = dataclasses.replace(manifest, tensors={"w": Tensor("float32", [4, 3], manifest.tensors["w"].chunks)})
    with pytest.raises(BrokenCheckpointError, match=r"does not hold all of w$"):
        read(tmp_path, in_part, {"w": torch.zeros(4, 3)})


@pytest.mark.parametrize(
    "second",
    [
        pytest.param([], id="a gap"),
        pytest.param([((3,), (3,))], id="a gap between"),
        pytest.param([((1,), (5,))], id="an overlap"),
        pytest.param([((1,), (4,))], id="an overlap and a gap, all in all the right number"),
        pytest.param([((2,), (5,))], id="more than there is"),
        pytest.param([((2,), (4,)), ((0,), (2,))], id="twice"),
        pytest.param([((0, 2), (1, 4))], id="of other dimensions"),
    ],
)
def test_ranks_that_do_not_fit_together(tmp_path: Path, second: list[Box]) -> None:
    first, other = written(tmp_path, {"v": cut(torch.zeros(6), [((0,), (2,))])}, {"w": torch.zeros(3)})
    size, checksum, chunks = other

    def with_second(boxes: list[Box]) -> list[Any]:
        more = [["v", "float32", [6], list(offsets), list(sizes)] for offsets, sizes in boxes]
        return [first, [size, checksum, chunks + more]]

    assert list(completed(EMPTY, with_second([((2,), (4,))]), {"v", "w"}).tensors) == ["v", "w"]
    with pytest.raises(ValueError, match=r"^the ranks have not written every element once of v$"):
        completed(EMPTY, with_second(second), {"v", "w"})


def test_ranks_that_differ_about_a_tensor(tmp_path: Path) -> None:
    first = {"w": cut(torch.zeros(4), [((0,), (2,))])}
    for other, told in ((torch.zeros(4).double(), r"float64 \[4\]"), (torch.zeros(5), r"float32 \[5\]")):
        with pytest.raises(ValueError, match=rf"^w is float32 \[4\] and, on rank 1, {told}$"):
            saved(tmp_path, first, {"w": cut(other, [((2,), (2,))])})


def test_expected_tensors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^no rank has written u, v$"):
        completed(EMPTY, written(tmp_path, {"w": torch.zeros(1)}), {"w", "v", "u"})


def test_a_file_that_does_not_hold_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(tensors: dict[str, torch.Tensor], path: Path) -> None:
        save(tensors | {"v@0": -tensors["v@0"]}, path)

    save = storage.save_file
    monkeypatch.setattr(storage, "save_file", spoil)
    with pytest.raises(OSError, match=r"rank_00000.safetensors does not hold what was written to it: v@0$"):
        write(tmp_path, 0, {"w": torch.ones(2), "v": torch.zeros(2)})  # only the sign of zero differs


def test_many_rectangles_take_little_time(tmp_path: Path) -> None:
    whole = torch.arange(4000.0).view(2000, 2)
    manifest = saved(tmp_path, {"w": cut(whole, [((row, 0), (1, 2)) for row in range(2000)])})
    found = torch.zeros(2000, 2)
    began = time.process_time()
    read(tmp_path, manifest, {"w": cut(found, [((row, 0), (1, 2)) for row in range(2000)])})
    assert time.process_time() - began < 2.0  # one pair after the other: 20 s
    assert torch.equal(found, whole)
