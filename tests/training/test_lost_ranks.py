"""What is told of a lost rank, also where the file system does not answer."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from megatron_tied.training import lost_ranks
from megatron_tied.training.lost_ranks import Loss, tell

TOLD = {5: Loss("silent", "nothing was heard of it for 60 s", 8410)}
WHO = "error: lost: rank 5 on node1 (last step done: 8410): nothing was heard of it for 60 s. "


def told(capsys: pytest.CaptureFixture[str], run_dir: Path, *, ends_all: bool = True) -> str:
    tell(TOLD, {5: "node1"}, run_dir, ends_all=ends_all)
    return capsys.readouterr().err


def test_what_to_go_on_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoints" / "step_00008400").mkdir(parents=True)
    way_on = "has a checkpoint of step 8400; to go on after it, start it again (train.resume: auto)"
    assert told(capsys, tmp_path) == f"{WHO}Every rank ends here; {tmp_path} {way_on}\n"


def test_without_heartbeats_the_others_do_not_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    waits = "The other ranks wait for it (train.liveness_timeout is 0)"
    assert told(capsys, tmp_path, ends_all=False) == f"{WHO}{waits}; {tmp_path} has no checkpoint\n"


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_file_system_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Path) -> str:
        raise PermissionError

    monkeypatch.setattr(lost_ranks, "how_to_go_on", fail)
    assert told(capsys, tmp_path) == f"{WHO}Every rank ends here\n"


def test_a_file_system_that_never_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lost_ranks, "_LOOK_SECONDS", 0.1)
    monkeypatch.setattr(lost_ranks, "how_to_go_on", lambda _: time.sleep(1000))
    assert told(capsys, tmp_path) == f"{WHO}Every rank ends here\n"
