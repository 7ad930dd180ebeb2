"""Weights & Biases: the metrics of TensorBoard, under the same names."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_tied.errors import Problem
from megatron_tied.files import write_whole
from megatron_tied.monitor.description import RunDescription
from megatron_tied.monitor.sinks import Metrics, Tables, tensorboard_tag
from megatron_tied.monitor.table_images import TableImages

RUN_ID_FILE = "wandb_run_id"
_STEP = "step"


class WandbSink:
    """One W&B run for all starts of a run; no error of W&B reaches the caller, and only the first is warned of.

    settings: project, and, if they are to be given, name, entity, mode ("online" or "offline"). Files of W&B lie in
    `directory`. Neither code nor output is uploaded.
    """

    def __init__(self, settings: Mapping[str, str | None], directory: Path, description: RunDescription, done: int = 0):
        self._warned = False
        self._wandb: Any = None
        self._run: Any = None
        self._images = TableImages(description)
        self._guarded(lambda: self._begin(settings, directory, description, done))

    def write(self, step: int, metrics: Metrics) -> None:
        """Add one point to each metric's chart."""
        self._images.note(metrics)
        self._log(step, lambda: {tensorboard_tag(name): value for name, value in metrics.items()})

    def write_tables(self, step: int, tables: Tables) -> None:
        """Add one image for each table."""
        self._log(step, lambda: self._pictures(step, tables))

    def close(self) -> None:
        """Finish the W&B run; it is gone on with if the run is started again."""
        if self._run is not None:
            self._guarded(self._run.finish)

    def _begin(
        self, settings: Mapping[str, str | None], directory: Path, description: RunDescription, done: int
    ) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=settings["project"],
            name=settings.get("name"),
            entity=settings.get("entity"),
            mode=settings.get("mode", "online"),
            dir=str(directory),
            id=_run_id(directory, description),
            # Begun anew from step 0, the run takes the place of what W&B has of it.
            resume="allow" if done else None,
            config={**description.config, "parameters": dict(description.parameters)},
            settings=wandb.Settings(
                console="off", disable_code=True, disable_git=True, save_code=False, x_save_requirements=False
            ),
        )
        # W&B drops what comes at a step below its own count, as after a resume from an older checkpoint; so its count
        # is left alone, and ours is the axis.
        self._run.define_metric(_STEP)
        self._run.define_metric("*", step_metric=_STEP)

    def _log(self, step: int, values: Callable[[], Mapping[str, Any]]) -> None:
        if self._run is not None:
            self._guarded(lambda: self._run.log({_STEP: step, **values()}))

    def _pictures(self, step: int, tables: Tables) -> Mapping[str, Any]:
        return {tag: self._wandb.Image(pixels) for tag, pixels in self._images.draw(step, tables).items()}

    def _guarded(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            # A network that is down, or a client that has changed, must not end a run of days.
            if not self._warned:
                logging.getLogger(__name__).warning("Weights & Biases: %s: %s", type(error).__name__, error)
            self._warned = True


def wandb_problem(settings: Mapping[str, str | None]) -> Problem | None:
    """What is wrong with asking for Weights & Biases on this host, if anything."""
    if find_spec("wandb") is not None:
        return None
    valid = "must be null where the package wandb is not installed: pip install wandb"
    return Problem("monitor.wandb", dict(settings), valid)


def _run_id(directory: Path, description: RunDescription) -> str:
    """The id kept in the run directory; without one, that which follows from the directory's place and the config."""
    kept = directory / RUN_ID_FILE
    if kept.is_file():
        return kept.read_text(encoding="utf-8").strip()
    what = json.dumps([str(directory.resolve()), description.config], sort_keys=True)
    run_id = hashlib.sha256(what.encode()).hexdigest()[:16]
    write_whole(kept, run_id + "\n")
    return run_id
