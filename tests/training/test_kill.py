"""A job that is killed at any instant goes on and ends as if nothing had happened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.runs import ROOT, Corpus, config_values, environment, series

STEPS, EVERY, KILLS, KEPT = 40, 3, 25, 2


def write_killable_config(directory: Path, corpus: Corpus, *, in_background: bool) -> Path:
    values = config_values(corpus, directory / "straight")
    values["train"] |= {"steps": STEPS, "log_every": 1, "eval_every": 0}
    values["checkpoint"] = {"save_every": EVERY, "keep_last": KEPT, "async_save": in_background}
    values["data"]["num_workers"] = 0
    values["monitor"] = {"tensorboard": False}
    path = directory / "config.yaml"
    path.write_text(json.dumps(values))
    return path


def torment(config: Path, victim: str, kills: int) -> dict:
    command = [sys.executable, "-m", "tests.training.kill_worker", str(config), str(config.parent)]
    done = subprocess.run(
        [*command, victim, str(kills), "7"],
        cwd=ROOT,
        env=environment(DS_ACCELERATOR="cpu"),
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def straight(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nobody has killed."""
    config = write_killable_config(tmp_path_factory.mktemp("straight"), corpus, in_background=False)
    return Path(torment(config, "job", 0)["ended"][0])


@pytest.mark.parametrize(
    ("victim", "in_background"), [pytest.param("rank", False, marks=pytest.mark.slow), ("job", True)]
)
def test_killed_at_any_instant(
    straight: Path, corpus: Corpus, tmp_path: Path, victim: str, in_background: bool
) -> None:
    config = write_killable_config(tmp_path, corpus, in_background=in_background)
    found = torment(config, victim, KILLS)
    lost = [kill["step"] - kill["saved"] for kill in found["kills"]]
    in_save = sum(kill["in_save"] for kill in found["kills"])
    print(
        f"\nSIGKILL of {victim}, saving {'in the background' if in_background else 'in the foreground'}: "
        f"{len(lost)} instants in {found['seconds']:.0f} s, {in_save} of them during a save; "
        f"steps lost {sorted(lost)}, save interval {EVERY}"
    )
    assert len(lost) == KILLS
    assert in_save > 0
    # In the background one save may be on its way while the next steps are done.
    assert max(lost) <= (2 * EVERY if in_background else EVERY)
    for run in found["ended"]:
        assert len(list(Path(run).glob("checkpoints/step_*"))) == KEPT
        for metric in ("loss", "grad_norm"):
            assert series(Path(run), metric) == series(straight, metric), f"{run}: {metric}"
