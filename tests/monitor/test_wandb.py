"""What Weights & Biases is told: by a stand-in for its client, and by the client itself, offline, where it is there."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_tied.monitor.description import RunDescription
from megatron_tied.monitor.sinks import Sinks
from megatron_tied.monitor.wandb import RUN_ID_FILE, WandbSink, wandb_problem
from tests.monitor.watched_run import describe, tables, write_steps

_BLOCK, _FULL, _LAST = 1 << 15, 1, 4

SETTINGS = {"project": "tied", "name": "first", "entity": None, "mode": "offline"}


class Client:
    """The part of the package that is used; `fails` names calls that raise."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.defined: list[tuple[str, str | None]] = []
        self.logged: list[dict[str, Any]] = []
        self.finished = 0
        self.fails: set[str] = set()

    def init(self, **arguments: Any) -> Client:
        self._called("init")
        self.begun.append(arguments)
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.defined.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        self._called("log")
        self.logged.append(values)

    def finish(self) -> None:
        self._called("finish")
        self.finished += 1

    def Settings(self, **settings: Any) -> SimpleNamespace:
        return SimpleNamespace(**settings)

    def Image(self, pixels: Any) -> tuple[str, int]:
        return "image", pixels.ndim

    def _called(self, name: str) -> None:
        if name in self.fails:
            raise ConnectionError(f"{name}: the network is down")


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    client = Client()
    monkeypatch.setitem(sys.modules, "wandb", client)
    return client


def start(directory: Path, done: int = 0, description: RunDescription | None = None) -> WandbSink:
    return WandbSink(SETTINGS, directory, description or describe(), done)


def test_what_a_run_begins_with(tmp_path, client):
    start(tmp_path)
    (begun,) = client.begun
    assert {name: begun[name] for name in SETTINGS} == SETTINGS
    assert begun["dir"] == str(tmp_path)
    assert begun["config"]["tie"]["group_size"] == 2
    assert begun["config"]["parameters"]["unique"] == 5_000_000
    settings = begun["settings"]
    assert (settings.save_code, settings.disable_code, settings.disable_git) == (False, True, True)


def test_only_the_project_must_be_given(tmp_path, client):
    WandbSink({"project": "tied"}, tmp_path, describe())
    assert (client.begun[0]["mode"], client.begun[0]["name"]) == ("online", None)


def test_metrics_have_our_step_and_tensorboards_names(tmp_path, client):
    with Sinks(start(tmp_path)) as sinks:
        sinks.write(3, {"lm_loss": 2.5, "lr/experts": 0.125})
        sinks.write(2, {"lm_loss": 2.0})
    assert client.logged == [
        {"step": 3, "train/lm_loss": 2.5, "lr/experts": 0.125},
        {"step": 2, "train/lm_loss": 2.0},
    ]
    assert client.defined == [("step", None), ("*", "step")]
    assert client.finished == 1


def test_tables_become_images(tmp_path, client):
    start(tmp_path).write_tables(50, tables(50))
    image = ("image", 3)
    assert client.logged == [{"step": 50, "load/layers": image, "load/banks": image, "agreement/groups": image}]


def test_a_run_that_goes_on_continues_the_same_run(tmp_path, client):
    changed = describe(train={"steps": 800})
    start(tmp_path)
    start(tmp_path, done=100, description=changed)
    start(tmp_path, done=0)
    first, resumed, anew = ((begun["id"], begun["resume"]) for begun in client.begun)
    assert first[0] == resumed[0] == anew[0] == (tmp_path / RUN_ID_FILE).read_text().strip()
    assert (first[1], resumed[1], anew[1]) == (None, "allow", None)


def test_the_id_follows_from_the_place_and_the_config(tmp_path, client):
    for name, description in (("a", describe()), ("b", describe()), ("c", describe(train={"seed": 8}))):
        (tmp_path / name).mkdir()
        start(tmp_path / name, description=description)
    (tmp_path / "a" / RUN_ID_FILE).unlink()
    start(tmp_path / "a", done=5)
    first, *others, again = (begun["id"] for begun in client.begun)
    assert first == again
    assert len({first, *others}) == 3


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_a_client_that_fails_is_warned_of_once_and_ends_nothing(tmp_path, client, caplog, failing):
    client.fails = {failing}
    with Sinks(start(tmp_path)) as sinks:
        for step in (1, 2):
            sinks.write(step, {"lm_loss": 2.5})
            sinks.write_tables(step, {"bank_load": {"0": [1.0]}})
    warning = f"Weights & Biases: ConnectionError: {failing}: the network is down"
    assert [record.getMessage() for record in caplog.records] == [warning]


def test_a_client_that_recovers_is_used_again(tmp_path, client):
    sink = start(tmp_path)
    client.fails = {"log"}
    sink.write(1, {"lm_loss": 2.5})
    client.fails = set()
    sink.write(2, {"lm_loss": 2.0})
    assert client.logged == [{"step": 2, "train/lm_loss": 2.0}]


def test_a_package_that_is_not_there(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with Sinks(start(tmp_path)) as sinks:
        sinks.write(1, {"lm_loss": 2.5})
    assert "ModuleNotFoundError" in caplog.text


@pytest.mark.parametrize("installed", [True, False])
def test_problem(installed, monkeypatch):
    monkeypatch.setattr("megatron_tied.monitor.wandb.find_spec", lambda name: object() if installed else None)
    problem = wandb_problem({"project": "tied"})
    assert (problem is None) == installed
    if problem:
        valid = "must be null where the package wandb is not installed: pip install wandb"
        assert str(problem) == f"monitor.wandb = {{'project': 'tied'}}: {valid}"


def test_the_package_itself_offline(tmp_path, monkeypatch, caplog):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_SILENT", "true")
    for done, last in ((0, 60), (50, 100)):
        with Sinks(start(tmp_path, done)) as sinks:
            write_steps(sinks, range(done + 1, last + 1))
    assert "Weights & Biases" not in caplog.text

    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    run_id = (tmp_path / RUN_ID_FILE).read_text().strip()
    assert len(runs) == 2
    assert all(run.name.endswith(run_id) for run in runs)
    for run, first, last in zip(runs, (1, 51), (60, 100), strict=True):
        records = map(Record.FromString, chunks(next(run.glob("*.wandb"))))
        rows = [history(record) for record in records if record.WhichOneof("record_type") == "history"]
        assert [int(row["step"]) for row in rows if "train/lm_loss" in row] == [
            step for step in range(first, last + 1) if step % 2 == 0
        ]
        assert any(name.startswith("load/layers") for row in rows for name in row)
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert not [name for name in names if name.endswith((".py", ".patch")) or name == "requirements.txt"]


def history(record: Any) -> dict[str, str]:
    return {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}


def chunks(path: Path) -> Iterator[bytes]:
    """The records of a W&B file: after 7 bytes a log of LevelDB, blocks of fragments with 7 bytes of header."""
    data, place, record = path.read_bytes(), 7, b""
    while place < len(data):
        if _BLOCK - place % _BLOCK < 7:
            place += _BLOCK - place % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (_FULL, _LAST):
            yield record
            record = b""
