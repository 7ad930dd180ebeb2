"""The watchdog reports nothing about a sound run, and names the parameter of which one copy has one bit wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.launch import launch


def _findings(directory: Path, steps: int) -> dict:
    result = directory / "findings.json"
    launch("tests.distributed.watchdog_worker", 4, str(result), str(steps))
    return json.loads(result.read_text())


@pytest.mark.parametrize("steps", [5, pytest.param(334, marks=pytest.mark.slow)])
def test_one_flipped_bit_is_found_and_named(tmp_path: Path, steps: int) -> None:
    for stage, findings in _findings(tmp_path, steps).items():
        assert findings["sound"] == [], f"stage {stage}"
        for name, differing in findings["found"].items():
            assert differing == [name], f"stage {stage}"
        assert len(findings["found"]) == 2
