"""What is said, and done, about checkpoints that are broken or do not fit, and about disks that are full."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_tied.checkpoint.directory import CheckpointDirectory
from megatron_tied.cli import main as cli
from megatron_tied.errors import ConfigError
from megatron_tied.training import startup
from megatron_tied.training.config_file import load_config
from megatron_tied.training.resume import _named, choose_start
from tests.training.runs import (
    ROOT,
    Corpus,
    Finished,
    alone_command,
    config_values,
    environment,
    finish,
    read_metrics,
    series,
)

STEPS, EVERY = 6, 2
EP = "parallel.expert_model_parallel_size=1"


@pytest.fixture(scope="module")
def config(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, six steps, a checkpoint every second step."""
    directory = tmp_path_factory.mktemp("faults")
    values = config_values(corpus, directory / "run")
    values["parallel"] = {}
    values["train"] |= {"steps": STEPS, "eval_every": 0}
    values["checkpoint"] = {"save_every": EVERY, "keep_last": 5, "async_save": False}
    values["monitor"] = {"tensorboard": False}
    values["data"]["num_workers"] = 0
    path = directory / "config.yaml"
    path.write_text(json.dumps(values))
    return path


@pytest.fixture(scope="module")
def whole(config: Path) -> Path:
    """The directory of a run that has ended well."""
    assert train(config).code == 0
    return config.parent / "run"


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged, without its end."""
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    shutil.rmtree(checkpoint(copy, STEPS))
    (copy / "checkpoints" / "latest").write_text(f"{checkpoint(copy, 4).name}\n")
    (copy / "summary.json").unlink()
    return copy


def train(config: Path, *overrides: str) -> Finished:
    return finish(alone_command(config, *overrides))


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def data_file(run: Path, step: int) -> Path:
    return checkpoint(run, step) / "rank_00000.safetensors"


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def change_format(run: Path, step: int, number: int) -> None:
    path = checkpoint(run, step) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": number}))


DAMAGE: dict[str, tuple[Any, str]] = {
    "bit": (lambda run: flip_a_bit(data_file(run, 4)), "{data}: is damaged: its content does not match its checksum"),
    "truncated": (lambda run: truncate(data_file(run, 4)), r"{data}: is truncated: [\d,]+ bytes instead of [\d,]+"),
    "missing": (lambda run: data_file(run, 4).unlink(), "{data}: is missing: No such file or directory"),
    "no manifest": (
        lambda run: (checkpoint(run, 4) / "manifest.json").unlink(),
        "{checkpoint}: is no complete checkpoint: it has no manifest.json",
    ),
    "newer": (
        lambda run: change_format(run, 4, 2),
        "{checkpoint}/manifest.json: is of format 2, of a newer version of this software; this one reads 1",
    ),
    "older": (
        lambda run: change_format(run, 4, 0),
        "{checkpoint}/manifest.json: is of format 0, of an older version of this software; this one reads 1",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_checkpoint_is_passed_over_with_a_warning(
    damage: str, config: Path, run: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    do, message = DAMAGE[damage]
    do(run)
    expected = message.format(data=data_file(run, 4), checkpoint=checkpoint(run, 4))
    finished = train(config, f"train.run_dir={run}")
    assert finished.code == 0, finished.output
    found = [line for line in finished.our_lines if line.startswith("warning: ")]
    assert len(found) == 1
    assert_matches(found[0].removeprefix("warning: "), expected)
    assert f"goes on after step 2: {checkpoint(run, 2)}" in finished.our_lines
    assert series(run, "loss") == series(whole, "loss")
    # The broken one is replaced by a sound one of the same step.
    assert cli.main(["checkpoint", "verify", str(checkpoint(run, 4))]) == 0
    assert capsys.readouterr().out.startswith(f"{checkpoint(run, 4)}: sound, 1 files of ")


def assert_matches(text: str, pattern: str) -> None:
    assert re.fullmatch(re.sub(r"\.(?=safetensors|json)", r"\\.", pattern), text), f"{text!r} is not {pattern!r}"


@pytest.mark.parametrize("damage", ["bit", "truncated", "missing"])
def test_verify_names_file_and_cause(damage: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    do, message = DAMAGE[damage]
    do(run)
    assert cli.main(["checkpoint", "verify", str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()[1:]
    assert_matches(
        line.strip(), f"DIR = '{run}': is not sound: " + message.format(data=data_file(run, 4), checkpoint="")
    )


def told(finished: Finished) -> list[str]:
    """The problems of a run that was refused."""
    assert finished.code == 2, finished.output
    assert "Traceback" not in finished.output
    first, *lines = finished.our_lines
    assert first.startswith(f"error: {len(lines)} problem")
    return [line.strip() for line in lines]


def test_a_broken_one_that_was_named_is_refused_and_a_sound_one_offered(config: Path, run: Path) -> None:
    flip_a_bit(data_file(run, 4))
    named = checkpoint(run, 4)
    (line,) = told(train(config, f"train.resume={named}", f"train.run_dir={run.parent / 'new'}"))
    assert line == (
        f"train.resume = '{named}': cannot be used: {data_file(run, 4)}: is damaged: its content does not match its "
        f"checksum. The newest sound checkpoint there is {checkpoint(run, 2)}"
    )
    assert not (run.parent / "new").exists()


def test_nothing_sound_is_an_error_and_not_a_new_beginning(config: Path, run: Path) -> None:
    flip_a_bit(data_file(run, 4))
    truncate(data_file(run, 2))
    before = read_metrics(run)
    (line,) = told(train(config, f"train.run_dir={run}"))
    assert line.startswith(f"train.resume = 'auto': no checkpoint in {run / 'checkpoints'} is sound: ")
    assert "is damaged" in line
    assert "is truncated" in line
    assert read_metrics(run) == before


def test_a_latest_that_points_nowhere(config: Path, run: Path) -> None:
    (run / "checkpoints" / "latest").write_text("step_00000099\n")
    elsewhere = f"train.run_dir={run.parent / 'new'}"
    (line,) = told(train(config, f"train.resume={run}", elsewhere))
    assert line == (
        f"train.resume = '{run}': cannot be used: {run}/checkpoints/latest: names step_00000099, which is not there. "
        f"The newest sound checkpoint there is {checkpoint(run, 4)}"
    )
    finished = train(config, f"train.run_dir={run}")
    assert f"warning: {run}/checkpoints/latest: names step_00000099, which is not there" in finished.our_lines
    assert f"goes on after step 4: {checkpoint(run, 4)}" in finished.our_lines


def test_another_model_topology_or_order_of_data(config: Path, run: Path) -> None:
    origin = f"as in {checkpoint(run, 4)}"
    other = ["model.hidden_size=64", "model.moe_router_topk=3", "tie.group_size=2", f"train.run_dir={run}"]
    assert told(train(config, *other)) == [
        f"model.ffn_hidden_size = 256: must be 128, {origin}",
        f"model.hidden_size = 64: must be 32, {origin}",
        f"model.kv_channels = 16: must be 8, {origin}",
        f"model.moe_router_topk = 3: must be 2, {origin}",
        f"tie = '5 layers: 0 [1 2] [3 4]': must be 5 layers: 0 [1 2 3 4], {origin}",
        f"train.run_dir = '{run}': holds that run: a new one needs a directory of its own",
    ]
    data = ["train.seed=7", "train.global_batch_size=16", "train.steps=3", f"train.run_dir={run}"]
    order = f"{origin}: another would change the order of samples; see train.init_from for a new run"
    assert told(train(config, *data)) == [
        f"train.global_batch_size = 16: must be 8, {order}",
        f"train.seed = 7: must be 1234, {order}",
        f"train.run_dir = '{run}': holds that run: a new one needs a directory of its own",
        f"train.steps = 3: must be at least 4, the step of {checkpoint(run, 4)}",
    ]


def test_a_path_says_where_a_run_begins_and_not_where_it_goes_on(config: Path, run: Path, tmp_path: Path) -> None:
    overrides = [f"train.run_dir={tmp_path / 'new'}", f"train.resume={checkpoint(run, 2)}"]
    first = train(config, *overrides)
    assert f"goes on after step 2: {checkpoint(run, 2)}" in first.our_lines
    shutil.rmtree(checkpoint(tmp_path / "new", 6))
    again = train(config, *overrides)
    assert again.code == 0
    assert f"goes on after step 4: {checkpoint(tmp_path / 'new', 4)}" in again.our_lines


def test_another_share_for_training_is_another_order(config: Path, run: Path, corpus: Corpus) -> None:
    line, way_out = told(train(config, f"train.run_dir={run}", f"data.validation={corpus.b}"))
    assert way_out.startswith(f"train.run_dir = '{run}': holds that run")
    assert line.startswith("data.split = 1.0: must leave 0.9 of data.train for training, as in ")


def test_a_latest_that_is_no_text(config: Path, run: Path) -> None:
    (run / "checkpoints" / "latest").write_bytes(b"\xff\xfe")
    finished = train(config, f"train.run_dir={run}")
    assert finished.code == 0
    (warning,) = [line for line in finished.our_lines if line.startswith("warning: ")]
    assert "latest: does not name a checkpoint: " in warning


def test_a_used_directory_and_resume_never(config: Path, run: Path) -> None:
    (line,) = told(train(config, "train.resume=never", f"train.run_dir={run}"))
    assert line == (
        f"train.run_dir = '{run}': holds an earlier run: name a new directory, or go on with it by train.resume=auto"
    )


def test_what_killed_runs_leave_is_no_checkpoint(config: Path, run: Path) -> None:
    shutil.copytree(checkpoint(run, 4), run / "checkpoints" / ".step_00000006.partial")
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 7, "lo')
    finished = train(config, f"train.run_dir={run}")
    assert f"goes on after step 4: {checkpoint(run, 4)}" in finished.our_lines
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4, 5, 6]


def test_longer_than_planned_is_said(config: Path, run: Path) -> None:
    finished = train(config, f"train.run_dir={run}", "train.steps=8")
    assert finished.code == 0
    assert (
        "warning: train.steps was 6 and is 8: learning rates and the order of samples are those of the new length"
    ) in finished.our_lines


# ---- disks ------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 1.5 MB: a checkpoint of the tiny model takes 0.9."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "none", str(disk)], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"cannot mount a file system: {mount.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("in_background", ["false", "true"])
def test_a_full_disk_is_told_and_training_goes_on(config: Path, small_disk: Path, in_background: str) -> None:
    run = small_disk / "run"
    overrides = [f"train.run_dir={run}", f"checkpoint.async_save={in_background}"]
    finished = train(config, *overrides)
    # The last step could not be saved: that is no success.
    assert finished.code == 1, finished.output
    lines = finished.our_lines
    assert f"step 2: saved {checkpoint(run, 2)}" in lines
    for step in (4, 6):
        (warning,) = [line for line in lines if line.startswith(f"WARNING: step {step} is NOT SAVED (rank 0: ")]
        assert "No space left on device" in warning
        assert warning.endswith("; older checkpoints are kept")
    assert lines[-1].startswith("error: step 6 is not saved: rank 0: ")
    assert series(run, "loss")[-1] < series(run, "loss")[0]
    # Nothing half-written is left, what was there is as it was, and the run can go on from it.
    assert sorted(entry.name for entry in (run / "checkpoints").glob("*step*")) == [checkpoint(run, 2).name]
    assert cli.main(["checkpoint", "verify", str(run)]) == 0
    subprocess.run(["mount", "-o", "remount,size=9000k", str(small_disk)], check=True)
    again = train(config, *overrides)
    assert again.code == 0, again.output
    assert f"goes on after step 2: {checkpoint(run, 2)}" in again.our_lines


def test_a_disk_that_cannot_be_written_is_found_before_training(config: Path, small_disk: Path) -> None:
    (small_disk / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    (line,) = told(train(config, f"train.run_dir={small_disk / 'run'}"))
    assert line.startswith(f"train.run_dir = '{small_disk / 'run'}': must be a directory that can be written: ")
    assert "Read-only file system" in line


@pytest.mark.usefixtures("one_process")
def test_directories_that_cannot_be_listed(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(directory: CheckpointDirectory) -> list[int]:
        raise PermissionError(13, "Permission denied", str(directory.root))

    monkeypatch.setattr(CheckpointDirectory, "steps", fail)
    told = rf"train.run_dir = '{tmp_path}': cannot be read: \[Errno 13\] Permission denied: '{tmp_path}/checkpoints'"
    with pytest.raises(ConfigError, match=told):
        choose_start(load_config(config, [f"train.run_dir={tmp_path}"]))
    with pytest.raises(ConfigError, match=rf"train.init_from = '{tmp_path}': cannot be used: .* has no manifest.json$"):
        _named(str(tmp_path), "train.init_from")


@pytest.mark.usefixtures("one_process")
def test_a_finished_run_without_checkpoints_is_not_begun_again(config: Path, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds a finished run without checkpoints: name a new directory"):
        choose_start(load_config(config, [f"train.run_dir={tmp_path}", "checkpoint.save_every=0"]))


@pytest.mark.usefixtures("one_process")
def test_a_run_directory_that_another_host_does_not_see(
    config: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the first rank has made is not there: this process stands for the other host.
    told = iter([["of the first rank"], ["node1"]])
    monkeypatch.setattr(startup, "gather_json", lambda value: next(told, [value]))
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    with pytest.raises(ConfigError, match="must be in a file system that all ranks share: checkpoints there are not"):
        startup._check_shared(load_config(config, [f"train.run_dir={run}"]))
    assert not list(run.glob("checkpoints/.shared.*"))


HOLDER = """
import sys
from pathlib import Path
from megatron_tied.training.run_lock import RunLock
with RunLock(Path(sys.argv[1])) as lock:
    print(lock.take(), flush=True)
    sys.stdin.read()
"""


def test_a_second_run_in_a_directory_is_refused_while_the_first_is_at_work(config: Path, run: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "None\n"
        finished = train(config, f"train.run_dir={run}")
        told = f"must not be that of a run that is at work, as process {holder.pid} on {socket.gethostname()} is"
        assert (finished.code, f"train.run_dir = '{run}': {told}" in finished.output) == (2, True), finished.output
        holder.kill()
    assert train(config, f"train.run_dir={run}").code == 0  # however it has ended


def test_a_config_of_ones_own_is_not_replaced(config: Path, tmp_path: Path) -> None:
    own = shutil.copy(config, tmp_path / "config.yaml")
    finished = train(Path(own), f"train.run_dir={tmp_path}")
    assert finished.code == 2
    assert f"train.run_dir = '{tmp_path}': must not hold {own} itself" in finished.output
    assert Path(own).read_text() == config.read_text()


def test_a_log_that_cannot_be_written_ends_no_run(config: Path, tmp_path: Path) -> None:
    command = alone_command(config, f"train.run_dir={tmp_path}")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, cwd=ROOT, env=environment(), stderr=full, timeout=300, check=False)
    assert done.returncode == 0
    assert (tmp_path / "summary.json").is_file()
