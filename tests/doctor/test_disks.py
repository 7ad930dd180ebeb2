"""A disk that a host cannot look at is a finding about that host, not the end of it."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_tied.doctor.disk import check_disk, existing
from megatron_tied.doctor.findings import Level
from megatron_tied.doctor.shared import check_shared
from megatron_tied.doctor.world import World
from megatron_tied.training.config import RunConfig
from megatron_tied.training.config_file import parse_config

HOST = socket.gethostname()


@pytest.fixture
def world(one_process: None) -> World:
    """This process alone."""
    return World(0, (HOST,))


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Of a run whose checkpoints go to `tmp_path/mount`, and its caches beside it."""
    model = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_moe_experts": 4, "vocab_size": 320}
    model |= {"moe_router_topk": 2, "moe_ffn_hidden_size": 32}
    train = {"run_dir": str(tmp_path / "mount" / "run"), "steps": 100}
    (tmp_path / "mount").mkdir()
    data = {"train": "a", "cache_dir": str(tmp_path / "cache")}
    return parse_config({"model": model, "train": train, "data": data, "checkpoint": {"save_every": 5}})


def plant(monkeypatch: pytest.MonkeyPatch, stale: Callable[[Path], bool]) -> None:
    """Let this process see some files as a host does whose mount has gone stale."""
    sound = os.stat

    def stat(path: str | Path, **options: object) -> os.stat_result:
        if isinstance(path, str | Path) and stale(Path(path)):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return sound(path, **options)

    monkeypatch.setattr(os, "stat", stat)


def test_a_run_goes_below_the_nearest_directory_that_can_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    assert existing(mount / "run" / "checkpoints") == mount
    plant(monkeypatch, lambda path: path.is_relative_to(mount))
    assert existing(mount / "run" / "checkpoints") == tmp_path


def test_a_stale_mount(world: World, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, lambda path: path.is_relative_to(tmp_path / "mount"))
    (finding,) = check_disk(world, config)
    assert (finding.check, finding.level, finding.hosts) == ("disk", Level.ERROR, (HOST,))
    assert f"Stale file handle: '{tmp_path}/mount/run/checkpoints' on {HOST}" in finding.what


def test_what_is_free_cannot_be_said(
    world: World, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def statvfs(path: str | Path) -> os.statvfs_result:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(os, "statvfs", statvfs)
    (finding,) = check_disk(world, config)
    assert (finding.level, finding.hosts) == (Level.ERROR, (HOST,))
    assert f"Input/output error: '{tmp_path}/mount'" in finding.what


def test_a_shared_directory_that_cannot_be_looked_into(
    world: World, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_tied.doctor.shared._SEEN_WITHIN_SECONDS", 0.0)
    plant(monkeypatch, lambda path: path.parent == tmp_path / "mount" and path.name.startswith(".doctor-"))
    run_dir, cache = check_shared(world, config)
    assert (run_dir.check, run_dir.level, run_dir.hosts) == ("shared", Level.ERROR, (HOST,))
    assert run_dir.what.startswith(f"train.run_dir = {tmp_path}/mount/run cannot be looked into, and every rank writes")
    assert run_dir.what.endswith(f"Stale file handle on {HOST}")
    assert cache.level is Level.OK
    assert list(tmp_path.rglob(".doctor-*")) == []


def test_a_shared_directory_that_cannot_be_written(
    world: World, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, **_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    # Below a directory that may not be searched, removing what is not there is refused, too.
    monkeypatch.setattr(Path, "touch", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    findings = check_shared(world, config)
    assert [(finding.level, finding.hosts) for finding in findings] == [(Level.ERROR, (HOST,))] * 2
    assert all(finding.what.endswith("cannot be written: Permission denied") for finding in findings)
