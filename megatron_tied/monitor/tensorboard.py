"""TensorBoard: scalars, dashboards, heat maps, and what the run is."""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import custom_scalars, hparams, text

from megatron_tied.monitor.dashboards import DASHBOARDS
from megatron_tied.monitor.description import RunDescription
from megatron_tied.monitor.sinks import Metrics, Tables, tensorboard_tag
from megatron_tied.monitor.table_images import TableImages

# The columns of the HParams tab: the last values of these curves.
_COMPARED = ("train/lm_loss", "validation/validation_loss", "progress/tokens_per_second")
_SHOWN_FIRST = ("tie.", "parameters.unique")
_MARK = ".description-"
_FILE_VERSION = "brain.Event:2"


class TensorBoardSink:
    """Scalars and images of tables, new after step `done`; dashboards, texts and hyperparameters, once."""

    def __init__(self, directory: Path, description: RunDescription, done: int = 0):
        _describe(directory, description)
        self._directory = str(directory)
        self._writer: SummaryWriter | None = SummaryWriter(self._directory, flush_secs=30, purge_step=done + 1)
        self._images = TableImages(description)

    def write(self, step: int, metrics: Metrics) -> None:
        """Add one point to each metric's chart."""
        self._images.note(metrics)
        with self._open_writer() as writer:
            for name, value in metrics.items():
                writer.add_scalar(tensorboard_tag(name), value, step)

    def write_tables(self, step: int, tables: Tables) -> None:
        """Add one image for each table."""
        images = self._images.draw(step, tables)
        with self._open_writer() as writer:
            for tag, pixels in images.items():
                writer.add_image(tag, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            self._writer.close()

    @contextmanager
    def _open_writer(self) -> Iterator[SummaryWriter]:
        """A writer that works: one that has failed once, its thread being dead, fails for ever."""
        if self._writer is None:
            self._writer = SummaryWriter(self._directory, flush_secs=30)
        try:
            yield self._writer
        except Exception:
            self._writer = None
            raise


def _describe(directory: Path, description: RunDescription) -> None:
    """Write what a run is to an event file of its own, unless the newest such file in `directory` says the same.

    All at step 0: TensorBoard forgets on a restart what comes after the step that is gone on with, and nothing else,
    so what is written again at each start would be there several times.
    """
    summaries = _summaries(description)
    mark = _MARK + hashlib.sha256(b"".join(map(_bytes, summaries))).hexdigest()[:16]
    directory.mkdir(parents=True, exist_ok=True)
    written = sorted(path.name for path in directory.glob(f"events.out.tfevents.*{_MARK}*"))
    if not written or not written[-1].endswith(mark):
        _write_events(directory, f"{len(written):04d}{mark}", summaries)


def _summaries(description: RunDescription) -> list[Summary]:
    charts = {
        dashboard: {title: ["Multiline", list(tags)] for title, tags in charts.items()}
        for dashboard, charts in DASHBOARDS.items()
    }
    layout = custom_scalars(charts)
    # Not the third, which says that the session has ended.
    compared = dict.fromkeys(_COMPARED, 0.0)
    experiment, session, _ = hparams(description.hparams(), compared)
    texts = {
        "run/config": description.config_markdown(),
        "run/topology": description.topology_markdown(),
        "run/parameters": description.parameters_markdown(),
    }
    told = [text(tag, markdown) for tag, markdown in texts.items()]
    return [layout, _with_ours_first(experiment), session, *told]


def _with_ours_first(experiment: Summary) -> Summary:
    """The HParams tab shows five columns unasked: first those that are said to differ between runs."""
    stored = experiment.value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(stored.content)
    for column in data.experiment.hparam_infos:
        column.differs = column.name.startswith(_SHOWN_FIRST)
    stored.content = data.SerializeToString()
    return experiment


def _bytes(summary: Summary) -> bytes:
    written: bytes = summary.SerializeToString(deterministic=True)
    return written


def _write_events(directory: Path, number_and_mark: str, summaries: Sequence[Summary]) -> None:
    now = time.time()
    # TensorBoard reads files in the order of their names, each to its end before the next, and takes a file for
    # finished when there is a later one: process 0 comes before that of the scalars.
    name = f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.0.{number_and_mark}"
    # Without "tfevents" in its name, by which TensorBoard would take it for a file of its own.
    partial = directory / f".{number_and_mark}.partial"
    with partial.open("wb") as file:
        records = RecordWriter(file)
        records.write(Event(wall_time=now, file_version=_FILE_VERSION).SerializeToString())
        for summary in summaries:
            records.write(Event(wall_time=now, step=0, summary=summary).SerializeToString())
    partial.replace(directory / name)
