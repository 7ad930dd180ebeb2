"""Metrics as they lie in the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_tied.monitor.sinks import JsonLinesSink, Sinks, TensorBoardSink, forget_metrics_after, tensorboard_tag


def lines(file: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_each_step_is_a_line_that_can_be_read_at_once(tmp_path):
    file = tmp_path / "metrics.jsonl"
    sink = JsonLinesSink(file)
    sink.write(1, {"loss": 2.5, "lr/dense": 1e-3})
    assert lines(file) == [{"step": 1, "loss": 2.5, "lr/dense": 1e-3}]
    sink.write(2, {"validation_loss": 3.0})
    assert lines(file)[1] == {"step": 2, "validation_loss": 3.0}
    sink.close()


def test_a_later_sink_adds_to_the_file(tmp_path):
    file = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        with Sinks(JsonLinesSink(file)) as sinks:
            sinks.write(step, {"loss": 1.0})
    assert [line["step"] for line in lines(file)] == [1, 2]


def test_a_run_that_goes_on_forgets_what_it_had_logged_later(tmp_path):
    file = tmp_path / "metrics.jsonl"
    with Sinks(JsonLinesSink(file)) as sinks:
        for step in (1, 2, 3):
            sinks.write(step, {"loss": 1.0 / step})
        sinks.write(2, {"validation_loss": 7.0})
    with file.open("ab") as stream:
        stream.write(b'\xff\n{"step": 2, "loss": 0.5}\n{"step": 4, "lo')
    assert forget_metrics_after(2, file) == {"loss": 0.5, "validation_loss": 7.0}
    assert [line["step"] for line in lines(file)] == [1, 2, 2, 2]
    assert forget_metrics_after(0, file) == {}
    assert lines(file) == []
    assert forget_metrics_after(0, tmp_path / "no such file") == {}


def test_tensorboard_forgets_it_too(tmp_path):
    for done, steps in ((0, (1, 2, 3)), (1, (2,))):
        with Sinks(TensorBoardSink(tmp_path, done)) as sinks:
            for step in steps:
                sinks.write(step, {"loss": float(10 * done + step)})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 12.0)]


def test_scalars_can_be_read_by_tensorboard(tmp_path):
    with Sinks(TensorBoardSink(tmp_path)) as sinks:
        sinks.write(3, {"loss": 2.5, "lr/experts": 0.125})
        sinks.write(6, {"loss": 1.5})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "lr/experts"}
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3, 2.5), (6, 1.5)]


@pytest.mark.parametrize(
    ("metric", "tag"),
    [
        ("loss", "train/loss"),
        ("lm_loss", "train/lm_loss"),
        ("lr", "train/lr"),
        ("grad_norm", "train/grad_norm"),
        ("aux_loss", "moe/aux_loss"),
        ("z_loss", "moe/z_loss"),
        ("lr/experts_lr_div_2", "lr/experts_lr_div_2"),
        ("validation_loss", "validation/validation_loss"),
        ("tokens_per_second", "progress/tokens_per_second"),
        ("memory_gb", "system/memory_gb"),
        ("unheard_of", "other/unheard_of"),
    ],
)
def test_charts(metric, tag):
    assert tensorboard_tag(metric) == tag


class Recorder:
    def __init__(self) -> None:
        self.seen: list[object] = []

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.seen.append((step, dict(metrics)))

    def close(self) -> None:
        self.seen.append("closed")


def test_all_sinks_get_everything_and_are_closed_after_an_error():
    recorders = Recorder(), Recorder()

    def run_that_fails() -> None:
        with Sinks(*recorders) as sinks:
            sinks.write(1, {"loss": 1.0})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_that_fails()
    assert [recorder.seen for recorder in recorders] == [[(1, {"loss": 1.0}), "closed"]] * 2


def test_other_ranks_have_none():
    with Sinks() as sinks:
        sinks.write(1, {"loss": 1.0})
