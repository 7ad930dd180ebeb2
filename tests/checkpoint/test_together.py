"""Two real ranks save and load: what one cannot do both know, and they tell each other nothing but JSON."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tied.checkpoint.manifest import Manifest
from megatron_tied.checkpoint.together import RankError, of_every_rank
from tests.distributed.launch import launch

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("together")


@pytest.fixture(scope="module")
def found(root: Path) -> Found:
    """What each rank has found."""
    output = launch("tests.checkpoint.together_worker", 2, str(root), timeout=200)
    (line,) = (line for line in output.splitlines() if line.startswith("FOUND "))
    return json.loads(line.removeprefix("FOUND "))


def test_nothing_is_pickled(found: Found) -> None:
    assert [of_rank["pickles"] for of_rank in found] == [[], []]


@pytest.mark.parametrize("name", ["saved", "saved in the background", "saved at last"])
def test_a_save_that_succeeds(found: Found, name: str) -> None:
    assert [of_rank[name] for of_rank in found] == [None, None]


def test_what_is_written(found: Found, root: Path) -> None:
    manifest = Manifest.read(root / "step_00000001")
    first, second = "rank_00000.safetensors", "rank_00001.safetensors"
    assert list(manifest.files) == [first, second]
    told = {
        name: (tensor.dtype, tensor.shape, [(chunk.file, chunk.offsets, chunk.sizes) for chunk in tensor.chunks])
        for name, tensor in manifest.tensors.items()
    }
    assert told == {
        "weight/w": ("float32", [4, 6], [(first, [0, 0], [2, 6]), (second, [2, 0], [2, 6])]),
        # Of what both have each writes its share.
        "buffer/b": ("float32", [2], [(first, [0], [2])]),
        "buffer/a": ("int64", [], [(second, [], [])]),
        "rng/rank_0": ("uint8", [3], [(first, [0], [3])]),
        "rng/rank_1": ("uint8", [3], [(second, [0], [3])]),
    }
    manifest.check_presence(root / "step_00000001")
    for name in manifest.files:
        manifest.check_file(root / "step_00000001", name)


@pytest.mark.parametrize("name", ["loaded", "loaded at last"])
def test_what_is_read(found: Found, name: str) -> None:
    whole = torch.arange(24.0).view(4, 6)
    for rank, columns in enumerate((slice(0, 5), slice(5, 6))):
        assert found[rank][name] == {
            "failure": None,
            "w": whole[:, columns].tolist(),
            "b": [1.5],
            "a": 7,
            "rng": [1 - rank] * 3,
        }


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("the first cannot write", "rank 0: [Errno 28] No space left on device"),
        ("the second cannot write", "rank 1: [Errno 28] No space left on device"),
        ("neither can write", "rank 0: this"),
        ("a reason of two lines", "rank 1: one two"),
        ("no reason", "rank 1: MemoryError"),
        ("the first cannot begin", "rank 0: [Errno 5] Input/output error"),
        ("the first cannot commit", "rank 0: [Errno 5] Input/output error"),
        ("missing", "rank 0: no rank has written weight/u, weight/v"),
        ("a gap", "rank 0: the ranks have not written every element once of weight/w"),
        ("an overlap", "rank 0: the ranks have not written every element once of weight/w"),
        ("two dtypes", "rank 0: weight/w is float32 [4, 6] and, on rank 1, float64 [4, 6]"),
    ],
)
def test_a_save_that_fails_is_known_to_all_and_leaves_nothing(found: Found, name: str, reason: str) -> None:
    left = ["latest", "step_00000001", "step_00000002"]
    assert [of_rank[name] for of_rank in found] == [{"failure": reason, "left": left}] * 2


def test_an_interrupted_save_is_known_to_all_and_goes_on_its_way(found: Found) -> None:
    assert [of_rank["Ctrl-C"]["failure"] for of_rank in found] == ["rank 1: KeyboardInterrupt", "KeyboardInterrupt: "]
    assert ["was interrupted" in of_rank for of_rank in found] == [False, True]
    assert found[0]["Ctrl-C"]["left"] == ["latest", "step_00000001", "step_00000002"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("not there", "rank 1: {path}: does not hold all of weight/v"),
        ("another shape", "rank 0: {path}: holds weight/w as [4, 6], not as [4, 7]"),
        ("not known", "rank 1: something else"),
    ],
)
def test_a_load_that_fails_is_known_to_all(found: Found, name: str, reason: str) -> None:
    told = reason.format(path=found[0]["path"])
    assert [of_rank[name] for of_rank in found] == [told] * 2


def test_ranks_are_in_order_after_all_that(found: Found) -> None:
    assert [of_rank["in order"] for of_rank in found] == [[[0], [1]]] * 2


@pytest.mark.usefixtures("one_process")
def test_what_was_to_be_saved_is_not_kept_after_a_failure() -> None:
    def fail() -> None:
        held = torch.zeros(1)
        kept.append(weakref.ref(held))
        raise ValueError("this")

    kept: list[weakref.ref[torch.Tensor]] = []
    gc.disable()
    try:
        with pytest.raises(RankError, match=r"^rank 0: this$") as raised:
            of_every_rank(fail)
        assert isinstance(raised.value.__cause__, ValueError)
        del raised
        assert kept[0]() is None
    finally:
        gc.enable()
