"""A launcher that does what a plan says: `stand_in PLAN_DIRECTORY [launcher options] ARGUMENTS OF THE RUN`.

PLAN_DIRECTORY holds `plan.json`, a list with an object for each start, and gets `starts.json`: the command line and the
hosts of every one. An object: `checkpoint`, the step of one that the run writes; `ranks`, how its ranks behave
("polite" ends at SIGTERM, "deaf" does not, "stopped" is stopped); `waits`, whether the launcher waits for them; `exit`;
`ends`, whether the last step is done (default: where `exit` is 0).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def launch(plan_directory: Path, words: list[str]) -> int:
    log = plan_directory / "starts.json"
    starts = json.loads(log.read_text()) if log.exists() else []
    at = words.index("--hostfile") + 1 if "--hostfile" in words else None
    hosts = Path(words[at]).read_text().split("\n") if at else []
    log.write_text(json.dumps([*starts, {"words": words, "hosts": hosts}]))
    todo = json.loads((plan_directory / "plan.json").read_text())[len(starts)]
    if step := todo.get("checkpoint"):
        (plan_directory / "run" / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    token = words[words.index("--supervised") :]
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank", how, *token],
            env=os.environ | {"RANK": str(rank)},
            start_new_session=True,
        )
        for rank, how in enumerate(todo.get("ranks", []))
    ]
    (plan_directory / "ranks.json").write_text(json.dumps([rank.pid for rank in ranks]))
    if todo.get("waits"):
        return max(rank.wait() for rank in ranks)
    time.sleep(todo.get("after", 0.3))
    if todo.get("ends", todo["exit"] == 0):
        (plan_directory / "run" / "summary.json").write_text("{}")
    return todo["exit"]


def be_rank(how: str) -> None:
    if how == "polite":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # What a rank starts does not have its command line.
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(1000)


if __name__ == "__main__":
    if sys.argv[1] == "--rank":
        be_rank(sys.argv[2])
    else:
        sys.exit(launch(Path(sys.argv[1]), sys.argv[2:]))
