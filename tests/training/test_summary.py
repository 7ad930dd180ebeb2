"""`summary.json` appears whole or not at all. Its figures are checked on finished runs, see test_pretrain_*."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megatron_tied.training.summary import overall, write_summary


def test_is_json_that_people_can_read(tmp_path: Path):
    path = tmp_path / "summary.json"
    write_summary(path, {"steps": 3, "parameters": {"unique": 5}})
    text = path.read_text()
    assert json.loads(text) == {"steps": 3, "parameters": {"unique": 5}}
    assert text.splitlines()[1] == '  "steps": 3,'
    assert text.endswith("}\n")
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def test_nothing_looks_finished_before_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "summary.json"

    def interrupted(source: Path, target: Path) -> None:
        assert json.loads(Path(source).read_text()) == {"steps": 3}
        assert target == path
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_summary(path, {"steps": 3})
    assert not path.exists()


def test_json_has_no_infinity_and_single_layers_are_left_out(tmp_path: Path):
    metrics = {"grad_norm": math.inf, "lr/dense": 0.5, "layer_max_vio/03": 1.0, "bank_update_ratio/112": 2.0}
    write_summary(tmp_path / "summary.json", {"steps": 4, **overall(metrics)})
    assert (tmp_path / "summary.json").read_text() == '{\n  "steps": 4,\n  "grad_norm": null,\n  "lr/dense": 0.5\n}\n'
