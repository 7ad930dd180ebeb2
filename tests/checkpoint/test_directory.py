"""Checkpoints appear whole, `latest` follows, and the newest verified one is never removed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_tied.checkpoint.directory import CheckpointDirectory, resolve
from megatron_tied.checkpoint.manifest import BrokenCheckpointError


def write(directory: CheckpointDirectory, step: int, content: str = "") -> None:
    directory.begin(step)
    (directory.staging(step) / "data").write_text(content or str(step))
    directory.commit(step)
    directory.name_latest(step)


@pytest.fixture
def directory(tmp_path: Path) -> CheckpointDirectory:
    return CheckpointDirectory(tmp_path)


def test_it_has_its_name_only_after_commit(directory: CheckpointDirectory) -> None:
    directory.begin(5)
    assert (directory.steps(), directory.latest()) == ([], None)
    directory.commit(5)
    assert (directory.steps(), directory.latest()) == ([5], None)
    directory.name_latest(5)
    assert directory.latest() == directory.path(5)
    assert directory.path(5).name == "step_00000005"


def test_the_remnants_of_killed_runs_are_removed_by_the_next_save(directory: CheckpointDirectory) -> None:
    write(directory, 5)
    directory.begin(10)
    for name in (".step_00000004.removed", ".step_00000003.replaced"):
        (directory.root / name).mkdir()
    write(directory, 15)
    assert sorted(entry.name for entry in directory.root.iterdir()) == ["latest", "step_00000005", "step_00000015"]


def test_a_broken_one_of_the_same_step_is_replaced(directory: CheckpointDirectory) -> None:
    write(directory, 5, "old")
    write(directory, 5, "new")
    assert (directory.path(5) / "data").read_text() == "new"
    assert [entry.name for entry in directory.root.glob(".step*")] == []


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [(1, 0, [50]), (2, 0, [50, 40]), (9, 0, [50, 40, 30, 20, 10]), (1, 20, [50, 40, 20]), (2, 30, [50, 40, 30])],
)
def test_retention(directory: CheckpointDirectory, keep_last: int, keep_every: int, left: list[int]) -> None:
    for step in (10, 20, 30, 40, 50):
        write(directory, step)
    directory.retain(50, keep_last=keep_last, keep_every=keep_every)
    assert directory.steps() == left


def test_retention_keeps_the_verified_one_and_newer_ones(directory: CheckpointDirectory) -> None:
    for step in (10, 20, 30):
        write(directory, step)
    directory.retain(20, keep_last=1, keep_every=0)
    assert directory.steps() == [30, 20]


def test_what_a_path_means(directory: CheckpointDirectory, tmp_path: Path) -> None:
    run = CheckpointDirectory(tmp_path / "run" / "checkpoints")
    run.root.mkdir(parents=True)
    write(run, 5)
    for path in (run.path(5), run.root, tmp_path / "run"):
        assert resolve(path) == run.path(5)
    assert resolve(tmp_path) == tmp_path
    (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(BrokenCheckpointError, match=f"is no run, but {tmp_path}/run in it is one$"):
        resolve(tmp_path)
    (tmp_path / "manifest.json").touch()  # a checkpoint, whoever has trained on in it
    assert resolve(tmp_path) == tmp_path
    (run.root / "latest").write_text("step_00000009\n")
    with pytest.raises(BrokenCheckpointError, match=r"latest: names step_00000009, which is not there$"):
        resolve(tmp_path / "run")
    for content, told in ((b"", "''"), (b"\xff\xfe", "does not name"), (b"../../etc", r"'\.\./\.\./etc'")):
        (run.root / "latest").write_bytes(content)
        with pytest.raises(BrokenCheckpointError, match=told):
            resolve(tmp_path / "run")


def test_a_remnant_that_cannot_be_removed_stops_no_save(
    directory: CheckpointDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = directory.root / ".step_00000005.removed"
    held.mkdir()
    remove = shutil.rmtree

    def busy(path: Path, ignore_errors: bool = False) -> None:
        if path != held:
            remove(path, ignore_errors=ignore_errors)
        elif not ignore_errors:
            raise OSError(16, "Device or resource busy", str(path))

    monkeypatch.setattr(shutil, "rmtree", busy)
    directory.staging(10).mkdir()
    directory.begin(10)
    assert list(directory.staging(10).iterdir()) == []
    assert held.is_dir()
