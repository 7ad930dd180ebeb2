"""A long run with everything on: memory, descriptors and threads of every rank stay as they are, TensorBoard readable.

`SOAK_MINUTES` (default 20) says how long, `SOAK_TABLE` where the figures go; they are printed in any case.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import time
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.training.runs import Corpus, config_values, deepspeed_command, series
from tests.training.test_signals import ranks, start

MINUTES = float(os.environ.get("SOAK_MINUTES", "20"))
SAMPLE_SECONDS = 5.0
WARM_UP = 0.3  # of the time: allocators and caches fill
# What memory may seem to grow by from the warm-up to the end, where noise is smaller than that.
GROWTH_BYTES = 8 << 20


class Sample(NamedTuple):
    seconds: float
    rss: int
    uss: int
    descriptors: int
    threads: int


def sample(process: psutil.Process, began: float) -> Sample:
    memory = process.memory_full_info()
    return Sample(time.monotonic() - began, memory.rss, memory.uss, process.num_fds(), process.num_threads())


def growth(samples: list[Sample], name: str) -> tuple[float, float]:
    """By how much it has grown along the median of all slopes, and the noise: the spread of values around that line."""
    times, values = [each.seconds for each in samples], [getattr(each, name) for each in samples]
    pairs = combinations(range(len(samples)), 2)
    slope = statistics.median((values[j] - values[i]) / (times[j] - times[i]) for i, j in pairs)
    offset = statistics.median(value - slope * at for at, value in zip(times, values, strict=True))
    noise = statistics.median(abs(value - slope * at - offset) for at, value in zip(times, values, strict=True))
    return slope * (times[-1] - times[0]), 3 * 1.4826 * noise  # three standard deviations, were it normal


def read_events(directory: Path) -> list[int]:
    """The steps of the loss, as TensorBoard reads them."""
    reader = EventAccumulator(str(directory), size_guidance={"scalars": 0, "images": 1, "histograms": 1})
    reader.Reload()
    return [event.step for event in reader.Scalars("train/loss")] if "train/loss" in reader.Tags()["scalars"] else []


@pytest.mark.slow
def test_soak(corpus: Corpus, tmp_path: Path) -> None:
    values = config_values(corpus, tmp_path / "run")
    values["train"] |= {"steps": 10_000_000, "eval_every": 200, "log_every": 10}
    values["checkpoint"] = {"save_every": 100, "keep_last": 2}
    values["monitor"] = {"every": 10, "expensive_every": 100}
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(values))
    log = tmp_path / "log"
    job = start(deepspeed_command(config), tmp_path / "run", output=log)
    began, draw = time.monotonic(), random.Random(8)
    processes = {f"rank {number}": process for number, process in enumerate(ranks(job))}
    samples: dict[str, list[Sample]] = {name: [] for name in processes}
    looks, next_look = 0, 0.0
    while (now := time.monotonic() - began) < MINUTES * 60:
        assert job.poll() is None, log.read_text()[-4000:]
        for name, process in processes.items():
            samples[name].append(sample(process, began))
        if now > next_look:
            steps = read_events(tmp_path / "run" / "tensorboard")
            assert steps == sorted(set(steps))
            looks, next_look = looks + 1, now + draw.uniform(5, 60)
        time.sleep(SAMPLE_SECONDS)
    for process in processes.values():
        process.send_signal(signal.SIGTERM)
    assert job.wait(120) == 0, log.read_text()[-4000:]
    logged = series(tmp_path / "run", "loss")
    assert len(read_events(tmp_path / "run" / "tensorboard")) == len(logged)
    lines = [
        f"{len(logged) * 10:,} steps in {MINUTES:g} minutes; TensorBoard read {looks} times at random moments",
        "| rank | memory | at the end, MB | growth after warm-up, MB | noise (3 sigma), MB | descriptors | threads |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    found = []
    for name, all_samples in samples.items():
        warm = all_samples[int(WARM_UP * len(all_samples)) :]
        half = len(warm) // 2
        for kind in ("rss", "uss"):
            grown, noise = growth(warm, kind)
            found.append((name, kind, grown, noise))
            ends = f"{warm[-1].descriptors} | {warm[-1].threads}"
            megabytes = f"{getattr(warm[-1], kind) / 1e6:.1f} | {grown / 1e6:+.2f} | {noise / 1e6:.2f}"
            lines.append(f"| {name} | {kind} | {megabytes} | {ends} |")
        for count in ("descriptors", "threads"):
            # Savers and evaluations come and go: what stays is what counts.
            early, late = (min(getattr(each, count) for each in part) for part in (warm[:half], warm[half:]))
            assert late <= early, f"{name}: {count} {early} -> {late}"
    print("\n" + "\n".join(lines))
    if path := os.environ.get("SOAK_TABLE"):
        Path(path).write_text("\n".join(lines) + "\n")
    for name, kind, grown, noise in found:
        assert grown <= max(noise, GROWTH_BYTES), f"{name}: {kind} has grown by {grown / 1e6:.1f} MB"
