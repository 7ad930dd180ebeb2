"""Metrics as they lie in the files."""

from __future__ import annotations

import json
import math
import resource
import tracemalloc
from pathlib import Path

import pytest

from megatron_tied.monitor.sinks import JsonLinesSink, Metrics, Sinks, Tables, forget_metrics_after, tensorboard_tag


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


def test_what_a_full_disk_has_no_room_for_is_written_when_there_is_room_again(tmp_path):
    file = tmp_path / "metrics.jsonl"
    sink = JsonLinesSink(file)
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    sink.write(1, {"loss": 1.0})
    try:
        # The first of them is written in part.
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 9, most))
        for step in (2, 3):
            with pytest.raises(OSError, match="File too large"):
                sink.write(step, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))
    sink.close()
    assert [line["step"] for line in lines(file)] == [1, 2, 3]


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


def test_lines_that_stay_are_not_rewritten(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step":1, "loss": 1e0}\r\n12\n{"loss": 3.0}\n{"step": 2, "loss": null}')
    assert forget_metrics_after(2, file) == {"loss": None}
    assert file.read_bytes() == b'{"step":1, "loss": 1e0}\n{"step": 2, "loss": null}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tables_are_a_line_of_their_own(tmp_path):
    file = tmp_path / "metrics.jsonl"
    with Sinks(JsonLinesSink(file)) as sinks:
        sinks.write(1, {"loss": math.inf})
        sinks.write_tables(1, {"expert_load": {"0": [1.0, math.nan]}, "agreement": {"1": [[1.0, 0.5], (0.5, 1.0)]}})
    tables = {"expert_load": {"0": [1.0, None]}, "agreement": {"1": [[1.0, 0.5], [0.5, 1.0]]}}
    assert lines(file) == [{"step": 1, "loss": None}, {"step": 1, **tables}]


def test_a_run_that_goes_on_forgets_later_tables_and_has_no_table_among_its_last_values(tmp_path):
    file = tmp_path / "metrics.jsonl"
    with Sinks(JsonLinesSink(file)) as sinks:
        for step in (1, 2):
            sinks.write(step, {"loss": 1.0})
            sinks.write_tables(step, {"bank_load": {"0": [1.0, float(step)]}})
    assert forget_metrics_after(1, file) == {"loss": 1.0}
    assert lines(file) == [{"step": 1, "loss": 1.0}, {"step": 1, "bank_load": {"0": [1.0, 1.0]}}]


def test_a_large_file_is_not_read_into_memory(tmp_path):
    file = tmp_path / "metrics.jsonl"
    line = json.dumps({"step": 1, "expert_load": {"0": [0.12345] * 10_000}}) + "\n"
    file.write_text(line * 300)
    tracemalloc.start()
    forget_metrics_after(1, file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert file.stat().st_size == 300 * len(line)
    assert peak < file.stat().st_size / 5


def test_a_failed_rewrite_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n')

    def full_disk(*paths: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        forget_metrics_after(1, file)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


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
        ("memory_fullest_gb", "system/memory_fullest_gb"),
        ("memory_allocated_gb", "system/memory_allocated_gb"),
        ("memory_reserved_gb", "system/memory_reserved_gb"),
        ("perplexity", "train/perplexity"),
        ("loss_scale", "train/loss_scale"),
        ("eta_seconds", "progress/eta_seconds"),
        ("parameters_unique", "model/parameters_unique"),
        ("parameters_untied", "model/parameters_untied"),
        ("layer_max_vio/03", "layer_max_vio/03"),
        ("unheard_of", "other/unheard_of"),
    ],
)
def test_charts(metric, tag):
    assert tensorboard_tag(metric) == tag


class Recorder:
    def __init__(self, error: OSError | None = None) -> None:
        self.seen: list[object] = []
        self._error = error

    def write(self, step: int, metrics: Metrics) -> None:
        self._take(step, metrics)

    def write_tables(self, step: int, tables: Tables) -> None:
        self._take(step, tables)

    def close(self) -> None:
        self._take("closed")

    def _take(self, *what: object) -> None:
        self.seen.append(what)
        if self._error:
            raise self._error


EVERYTHING = [(1, {"loss": 1.0}), (1, {"bank_load": {"0": [1.0]}}), ("closed",)]


def test_all_sinks_get_everything_and_are_closed_after_an_error():
    recorders = Recorder(), Recorder()

    def run_that_fails() -> None:
        with Sinks(*recorders) as sinks:
            sinks.write(1, {"loss": 1.0})
            sinks.write_tables(1, {"bank_load": {"0": [1.0]}})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_that_fails()
    assert [recorder.seen for recorder in recorders] == [EVERYTHING] * 2


@pytest.mark.parametrize("error", [OSError("no space left"), ValueError("cannot be drawn")])
def test_a_sink_that_fails_stops_neither_the_run_nor_the_other_sinks_and_says_so_once(error, caplog):
    recorders = Recorder(error), Recorder()
    with Sinks(*recorders) as sinks:
        sinks.write(1, {"loss": 1.0})
        sinks.write_tables(1, {"bank_load": {"0": [1.0]}})
    assert [recorder.seen for recorder in recorders] == [EVERYTHING] * 2
    text = "Recorder: metrics of step 1 not written, and what follows may be lost until it works again"
    assert [record.getMessage() for record in caplog.records] == [f"{text}: {type(error).__name__}: {error}"]


def test_a_sink_that_fails_again_after_it_worked_is_told_again(caplog):
    recorder = Recorder(OSError("no space left"))
    sinks = Sinks(recorder)
    sinks.write(1, {"loss": 1.0})
    recorder._error = None
    sinks.write(2, {"loss": 1.0})
    recorder._error = OSError("no space left")
    sinks.write(3, {"loss": 1.0})
    assert ["step 1 " in caplog.records[0].getMessage(), "step 3 " in caplog.records[1].getMessage()] == [True, True]
    assert len(caplog.records) == 2


def test_other_ranks_have_none():
    with Sinks() as sinks:
        sinks.write(1, {"loss": 1.0})
        sinks.write_tables(1, {"bank_load": {"0": [1.0]}})
