"""Runs for the monitoring's tests, in one process: `monitored_runs CONFIG DIRECTORY`.

interrupted: fails three times after steps that its newest checkpoint does not have, and is started again each time.
collapsed: all routers send every token to the same two experts. discarded: the first steps overflow. healthy: 250 steps
of a small model. Each one's lines go to DIRECTORY/NAME.log.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from megatron_tied.layers.moe_layer import tied_layers
from megatron_tied.training import loop, run
from tests.training.many_runs import joined_once, train

FAILS_AFTER = (5, 8, 11)
INTERRUPTED = ["train.steps=12", "checkpoint.save_every=3", "monitor.every=1", "monitor.expensive_every=2"]
COLLAPSED = [
    *("train.steps=40", "monitor.every=1", "monitor.dead_window=20", "monitor.alerts.patience=5"),
    *("model.moe_router_score_function=sigmoid", "model.moe_router_enable_expert_bias=true"),
    *("model.moe_router_load_balancing_type=none", "model.moe_aux_loss_coeff=0.0"),
    *("optimizer.lr=5e-4", "deepspeed.tensorboard.enabled=true"),
]
DISCARDED = [
    *("train.steps=4", "train.precision=fp16", "deepspeed.fp16.initial_scale_power=24"),
    *("monitor.every=1", "monitor.expensive_every=1"),
]
HEALTHY = [
    *("train.steps=250", "train.eval_every=0", "train.global_batch_size=4"),
    *("monitor.every=2", "monitor.expensive_every=20"),
    *("monitor.dead_window=100", "optimizer.lr=2e-3", "optimizer.warmup_steps=25"),
]


class Killed(Exception):
    """Stands for whatever ends a process."""


def failing(after: int) -> contextlib.AbstractContextManager:
    """The run fails after step `after`, before it can save."""

    def fail(engine: object, step: int, settings: object) -> None:
        if step == after:
            raise Killed

    return mock.patch.object(loop, "check_consistency", fail)


@contextlib.contextmanager
def collapsed_routers() -> Iterator[None]:
    """Every router prefers the first two experts whatever a token says."""
    original = run.build_engine

    def build(config):
        engine, *rest = original(config)
        for layer in tied_layers(engine.module):
            layer.router.expert_bias[:2] = 100.0
        return engine, *rest

    with mock.patch.object(run, "build_engine", build):
        yield


def main(config: str, directory: str) -> None:
    """All of them, one after the other."""

    def start(name: str, overrides: list[str]) -> None:
        place = Path(directory, name)
        with place.with_suffix(".log").open("a") as log, contextlib.redirect_stderr(log):
            code = train(config, str(place), overrides)
        assert code == 0, place.with_suffix(".log").read_text()

    with joined_once():
        for step in FAILS_AFTER:
            with failing(step), contextlib.suppress(Killed):
                start("interrupted", INTERRUPTED)
        start("interrupted", INTERRUPTED)
        with collapsed_routers():
            start("collapsed", COLLAPSED)
        start("discarded", DISCARDED)
        start("healthy", HEALTHY)


if __name__ == "__main__":
    main(*sys.argv[1:])
