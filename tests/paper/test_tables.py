"""Tables of runs: means, differences seed by seed, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from make_tables import families, main, read_rows, split_name

# Held-out losses by row and seed: g4 is 0.02 above g1 in the mean, by 0.01, 0.02 and 0.03; w4x is not clearly above.
LOSSES = {
    "tiny-g1": {1: 3.0, 2: 3.1, 3: 3.2},
    "tiny-g4": {1: 3.01, 2: 3.12, 3: 3.23},
    "tiny-g4-w4x": {1: 3.1, 2: 3.1, 3: 3.1},
}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name, by_seed in LOSSES.items():
        for seed, loss in by_seed.items():
            directory = tmp_path / f"{name}-seed{seed}"
            directory.mkdir()
            summary = {"steps": 20, "tokens": 2000, "validation_loss": loss, "parameters": {"unique": 10**9}}
            (directory / "summary.json").write_text(json.dumps(summary))
            speed = 100.0 if "g1" in name else 120.0
            lines = [
                {"step": 10, "validation_loss": loss + 1, "tokens_per_second": 1.0},
                {"step": 15, "tokens_per_second": speed, "agreement_top1/01": 0.2, "agreement_top1/02": 0.4},
                {"step": 20, "validation_loss": loss, "tokens_per_second": speed, "agreement_top1_chance/01": 0.1},
            ]
            (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    unfinished = tmp_path / "tiny-g2-seed1"
    unfinished.mkdir()
    (unfinished / "metrics.jsonl").write_text('{"step": 1, "validation_loss": 9.0}\n')
    return tmp_path


def cells(text: str, row: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_table_has_means_and_differences_of_the_same_seed(runs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert main([str(runs), "--output", str(output)]) == 0
    text = (output / "tables.md").read_text()
    assert "g2" not in text
    assert cells(text, "g1")[1:6] == ["1,000,000,000", "16.000 GB", "3", "3.1000 ± 0.1000", "-"]
    # t(0.975; 2) = 4.3027, and 0.01 / sqrt(3) is the standard error of 0.01, 0.02, 0.03.
    assert cells(text, "g4")[4:9] == ["3.1200 ± 0.1100", "+0.0200 ± 0.0248 (n. s.)", "0.300 (0.100)", "-", "1.20x"]
    assert cells(text, "g4-w4x")[5] == "+0.0000 ± 0.2484 (n. s.)"
    assert (output / "tiny.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_of_unequal_length_are_drawn_as_far_as_they_go(runs: Path, tmp_path: Path) -> None:
    with (runs / "tiny-g1-seed2" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 30, "validation_loss": 1.0}\n')
    assert main([str(runs), "--output", str(tmp_path / "out")]) == 0


def test_a_clear_difference_is_not_called_none(runs: Path, tmp_path: Path) -> None:
    for seed, loss in LOSSES["tiny-g1"].items():
        path = runs / f"tiny-g4-seed{seed}" / "summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"validation_loss": loss + 0.02 + seed * 1e-3}))
    main([str(runs), "--output", str(tmp_path / "out")])
    assert cells((tmp_path / "out" / "tables.md").read_text(), "g4")[5] == "+0.0220 ± 0.0025"


def test_rows_stand_in_the_papers_order_and_what_has_no_figures_is_named(runs: Path) -> None:
    (runs / "tables").mkdir()
    diverged = runs / "tiny-g1-seed1" / "summary.json"
    diverged.write_text(json.dumps(json.loads(diverged.read_text()) | {"validation_loss": None}))
    rows, left_out = read_rows(runs)
    assert left_out == ["tiny-g1-seed1", "tiny-g2-seed1"]
    assert {family: [row.variant for row in of] for family, of in families(rows).items()} == {
        "tiny": ["g1", "g4", "g4-w4x"]
    }


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("olmoe-tiny-g4-w2x", ("olmoe-tiny", "g4-w2x")),
        ("qwen3_moe-small-narrow", ("qwen3_moe-small", "narrow")),
        ("g4", ("miniature", "g4")),
        ("fine-4groups-all-lr_none", ("fine", "4groups-all-lr_none")),
    ],
)
def test_names_are_families_and_variants(name: str, parts: tuple[str, str]) -> None:
    assert split_name(name) == parts


def test_no_finished_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for directory in (tmp_path, tmp_path / "none"):
        assert main([str(directory), "--output", str(tmp_path / "out")]) == 2
        assert f"RUNS = '{directory}': must " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
