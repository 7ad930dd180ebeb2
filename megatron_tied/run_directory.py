"""What a run directory holds, by name, and what a run has logged last."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"  # there when the last step is done
CHECKPOINTS = "checkpoints"

_TAIL_BYTES = 1 << 20  # of metrics.jsonl: its last lines


def run_inside(directory: Path) -> Path | None:
    """A run one directory further down, which a path that is too short may mean."""
    return min((found.parent for found in directory.glob(f"*/{METRICS}")), default=None)


def last_logged(directory: Path, name: str) -> dict[str, Any]:
    """The last object of metrics.jsonl that has the metric `name`; nothing without one."""
    try:
        with (directory / METRICS).open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = stream.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            metrics = json.loads(line)
        except ValueError:  # half a line, at either end, or what a killed run has written in part
            continue
        if isinstance(metrics, dict) and name in metrics:
            return metrics
    return {}
