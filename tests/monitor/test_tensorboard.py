"""Event files as TensorBoard reads them, after one start and after several."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from megatron_tied.monitor.dashboards import DASHBOARDS
from megatron_tied.monitor.sinks import Sinks
from megatron_tied.monitor.tensorboard import TensorBoardSink
from tests.monitor.watched_run import TOPOLOGY, describe, tables, write_steps

IMAGES = ["agreement/groups", "load/banks", "load/layers"]
TEXTS = {f"run/{name}/text_summary" for name in ("config", "topology", "parameters")}
LAYOUT = "custom_scalars__config__"
HPARAMS = {"_hparams_/experiment", "_hparams_/session_start_info"}


def read(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return events.Reload()


def raw_events(directory: Path) -> Iterator[Event]:
    for file in sorted(directory.glob("*tfevents*")):
        for record in RawEventFileLoader(str(file)).Load():
            yield Event.FromString(record)


def times_written(directory: Path) -> Counter[str]:
    return Counter(value.tag for event in raw_events(directory) for value in event.summary.value)


def text(events: EventAccumulator, name: str) -> list[str]:
    return [event.tensor_proto.string_val[0].decode() for event in events.Tensors(f"run/{name}/text_summary")]


def test_scalars(tmp_path):
    with Sinks(TensorBoardSink(tmp_path, describe())) as sinks:
        sinks.write(3, {"loss": 2.5, "lr/experts": 0.125})
        sinks.write(6, {"loss": 1.5})
    events = read(tmp_path)
    assert set(events.Tags()["scalars"]) == {"train/loss", "lr/experts"}
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3, 2.5), (6, 1.5)]


def test_a_writer_that_has_failed_is_replaced(tmp_path, monkeypatch):
    sink = TensorBoardSink(tmp_path, describe())
    sink.write(1, {"loss": 1.0})

    def fail(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(sink._writer, "add_scalar", fail)
    with pytest.raises(OSError, match="no space"):
        sink.write(2, {"loss": 2.0})
    sink.write(3, {"loss": 3.0})
    sink.close()
    assert [event.step for event in read(tmp_path).Scalars("train/loss")][-1] == 3


def test_a_run_that_goes_on_forgets_what_it_had_logged_later(tmp_path):
    for done, steps in ((0, (1, 2, 3)), (1, (2,))):
        with Sinks(TensorBoardSink(tmp_path, describe(), done)) as sinks:
            for step in steps:
                sinks.write(step, {"loss": float(10 * done + step)})
                sinks.write_tables(step, {"bank_load": {"0": [1.0, 1.0]}})
    events = read(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 12.0)]
    assert [event.step for event in events.Images("load/banks")] == [1, 2]


def test_images_of_tables(tmp_path):
    with Sinks(TensorBoardSink(tmp_path, describe())) as sinks:
        sinks.write_tables(50, tables(50))
        sinks.write_tables(100, {"agreement": tables(100)["agreement"]})
    events = read(tmp_path)
    assert sorted(events.Tags()["images"]) == IMAGES
    assert [event.step for event in events.Images("load/layers")] == [50]
    assert [event.step for event in events.Images("agreement/groups")] == [50, 100]
    for tag in IMAGES:
        (width, height), *_ = {Image.open(io.BytesIO(event.encoded_image_string)).size for event in events.Images(tag)}
        assert 300 < width < 600
        assert 200 < height < 400


def drawn_agreement(monkeypatch: pytest.MonkeyPatch, directory: Path) -> dict[str, Any]:
    """What is asked of the drawing of agreement."""
    asked: dict[str, Any] = {}

    def draw(matrices: dict, layers: dict, chance: dict, step: int) -> Figure:
        asked.update(layers={bank: tuple(numbers) for bank, numbers in layers.items()}, chance=chance, step=step)
        return Figure()

    monkeypatch.setattr("megatron_tied.monitor.heat_maps.agreement_heat_maps", draw)
    with Sinks(TensorBoardSink(directory, describe())) as sinks:
        sinks.write(50, {"agreement_overlap_chance/02": 0.25, "agreement_overlap/02": 0.5, "loss": 1.0})
        sinks.write(50, {"agreement_overlap_chance/01": 0.125})
        sinks.write_tables(50, {"agreement": {"1": [[1.0, 0.5], [0.5, 1.0]], "2": [[1.0, 0.5], [0.5, 1.0]]}})
    return asked


def test_agreement_is_drawn_with_its_layers_and_chance(tmp_path, monkeypatch):
    asked = drawn_agreement(monkeypatch, tmp_path)
    assert asked == {"layers": {"1": (1, 2), "2": (3, 4)}, "chance": {"1": 0.125, "2": 0.25}, "step": 50}


def test_dashboards(tmp_path):
    TensorBoardSink(tmp_path, describe()).close()
    (event,) = read(tmp_path).Tensors(LAYOUT)
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    assert {
        category.title: {chart.title: tuple(chart.multiline.tag) for chart in category.chart}
        for category in layout.category
    } == DASHBOARDS
    assert [category.title for category in layout.category] == list(DASHBOARDS)


def test_texts(tmp_path):
    TensorBoardSink(tmp_path, describe()).close()
    events = read(tmp_path)
    assert text(events, "config") == [describe().config_markdown()]
    assert text(events, "topology") == [describe().topology_markdown()]
    assert TOPOLOGY.describe() in text(events, "topology")[0]
    assert text(events, "parameters") == [describe().parameters_markdown()]


def test_hyperparameters_are_those_of_the_same_run_and_name_its_curves(tmp_path):
    TensorBoardSink(tmp_path, describe()).close()
    assert all(path.is_file() for path in tmp_path.iterdir())
    events = read(tmp_path)
    contents = events.PluginTagToContent("hparams")
    assert contents.keys() == HPARAMS
    session = HParamsPluginData.FromString(contents["_hparams_/session_start_info"]).session_start_info
    experiment = HParamsPluginData.FromString(contents["_hparams_/experiment"]).experiment
    assert session.hparams["tie.group_size"].number_value == 2
    assert session.hparams["tie.pattern"].string_value == "consecutive"
    assert session.hparams.keys() == describe().hparams().keys()
    assert [metric.name.tag for metric in experiment.metric_infos] == [
        *("train/lm_loss", "validation/validation_loss", "progress/tokens_per_second")
    ]
    assert {info.name for info in experiment.hparam_infos if info.differs} == {
        *("tie.group_size", "tie.pattern", "tie.num_tied_experts", "tie.lr_divisor", "tie.share", "parameters.unique")
    }


STARTS = ((0, 160), (150, 260), (200, 320), (300, 400))


def test_restarts_neither_double_nor_disturb(tmp_path):
    for done, last in STARTS:
        with Sinks(TensorBoardSink(tmp_path, describe(), done)) as sinks:
            write_steps(sinks, range(done + 1, last + 1))
    written = times_written(tmp_path)
    assert {tag: written[tag] for tag in {LAYOUT, *TEXTS, *HPARAMS}} == dict.fromkeys({LAYOUT, *TEXTS, *HPARAMS}, 1)

    events = read(tmp_path)
    assert [event.step for event in events.Scalars("train/lm_loss")] == list(range(2, 401, 2))
    assert [event.step for event in events.Scalars("validation/validation_loss")] == list(range(50, 401, 50))
    for tag in events.Tags()["scalars"]:
        assert all(one.step < other.step for one, other in pairwise(events.Scalars(tag))), tag
    assert sorted(events.Tags()["images"]) == IMAGES
    for tag in IMAGES:
        assert [event.step for event in events.Images(tag)] == list(range(50, 401, 50))
    assert {tag: len(events.Tensors(tag)) for tag in events.Tags()["tensors"]} == dict.fromkeys({LAYOUT, *TEXTS}, 1)


def test_a_description_that_has_changed_is_written_again(tmp_path):
    more_steps = describe(train={"steps": 800})
    for done, description in ((0, describe()), (10, more_steps), (20, more_steps)):
        TensorBoardSink(tmp_path, description, done).close()
    assert text(read(tmp_path), "config") == [describe().config_markdown(), more_steps.config_markdown()]
    assert times_written(tmp_path)[LAYOUT] == 2


def test_a_description_outlives_a_return_to_an_earlier_step(tmp_path):
    for done in (0, 100, 50, 0):
        TensorBoardSink(tmp_path, describe(), done).close()
    assert text(read(tmp_path), "config") == [describe().config_markdown()]


def test_a_start_that_was_killed_early_leaves_no_half_description(tmp_path, monkeypatch):
    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            TensorBoardSink(tmp_path, describe())
    assert not list(tmp_path.glob("*tfevents*"))
    TensorBoardSink(tmp_path, describe()).close()
    assert text(read(tmp_path), "config") == [describe().config_markdown()]


def test_the_description_comes_first_so_that_a_tensorboard_that_looks_on_reads_what_follows(tmp_path):
    """DirectoryWatcher takes a file for finished once it has seen a later one."""
    sink = TensorBoardSink(tmp_path, describe())
    files = sorted(path.name for path in tmp_path.glob("*tfevents*"))
    assert [".description-" in name for name in files] == [True, False]
    events = read(tmp_path)
    sink.write(1, {"loss": 1.0})
    sink.close()
    assert [event.step for event in events.Reload().Scalars("train/loss")] == [1]
