"""examples/paper/data/prepare.sh, on directories of the schema of the data sets on the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from megatron_tied.data.tokenizer import SentencePieceTokenizer
from tests.data.corpus import make_text
from tests.data.hf import dclm_edu, finephrase
from tests.data.test_prepare_data import files, stored_documents

RECIPE = Path(__file__).parents[2] / "examples" / "paper" / "data"
TEXTS = [[make_text(60, 100 * file + row) for row in range(30)] for file in range(3)]


def prepare(out: Path, steps: int, **settings: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["bash", RECIPE / "prepare.sh", out, str(steps)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path} | {key: str(value) for key, value in settings.items()}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def run(out: Path, **settings: str | Path) -> str:
    done = prepare(out, 1, **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_recipe(tmp_path: Path, model: Path, tokenizer: SentencePieceTokenizer) -> None:
    settings = {
        "DCLM": dclm_edu(tmp_path / "dclm", TEXTS),
        "FINEPHRASE": finephrase(tmp_path / "finephrase", TEXTS),
        "FINEPHRASE_CONFIG": "default",
        "FINEPHRASE_TEXT": "rollout_results.text",
        "TOKENIZER": model,
        "HELD_OUT_ROWS": "7",
        "WORKERS": "1",
    }
    out = tmp_path / "paper"
    # A step asks for more tokens than there are here; the arithmetic is that of the README's table.
    assert "ended before 397,148 tokens" in run(out, **settings)
    expected = sorted([tokenizer.eod, *tokenizer.encode(text)] for rows in TEXTS for text in rows)
    for name in ("dclm-edu", "finephrase"):
        held_out, train = (stored_documents(out / f"{name}-{part}") for part in ("held-out", "train"))
        assert len(held_out) == 7
        assert sorted(held_out + train) == expected
    before = files(out / "dclm-edu-train")
    assert run(out, **settings).splitlines() == [
        f"{out / name}-{part} is there" for name in ("dclm-edu", "finephrase") for part in ("held-out", "train")
    ]
    assert files(out / "dclm-edu-train") == before
    # Not taken for what a longer training needs, nor for what goes with other held-out rows.
    longer = prepare(out, 2, **settings)
    assert longer.returncode == 1
    assert f"{out}/dclm-edu-train was made for 397,148 tokens, and 794,296 are wanted" in longer.stderr
    metadata = out / "finephrase-held-out.json"
    content = json.loads(metadata.read_text())
    content["source"]["files_sha256"] = "0"
    metadata.write_text(json.dumps(content))
    other = prepare(out, 1, **settings)
    assert other.returncode == 1
    assert "held-out rows may be trained on" in other.stderr


def test_the_readme_names_what_the_recipe_makes() -> None:
    text = (RECIPE / "README.md").read_text()
    data = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])["data"]
    for blend, part in ((data["train"], "train"), (data["validation"], "held-out")):
        assert blend == [0.75, f"data/paper/dclm-edu-{part}", 0.25, f"data/paper/finephrase-{part}"]
    for steps in (20_000, 30_000):
        for share in (75, 25):
            assert f"{steps * 524_288 * share // 100 * 101 // 100:,}" in text
