"""Ranks that do nothing but heartbeats: `liveness_worker CASE TIMEOUT RUN_DIR COUNT`.

All are forked from one process, which has imported everything. Each writes `RANK PID` when it has begun, and for each
that has ended `ended RANK CODE` is written. Rank 1 does what CASE says: it fails, or ends late; else all wait, with
"follows" in a collective, with "patient" where silence counts late.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from megatron_tied.training.liveness import Liveness

STEP, WAIT_SECONDS = 7, 60


def be_rank(rank: int, case: str, timeout: float, run_dir: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.distributed.init_process_group("gloo")
    with Liveness(timeout, run_dir) as liveness:
        liveness.step_done(STEP + rank)
        time.sleep(timeout / 3)  # for a heartbeat with it to arrive
        os.write(1, f"{rank} {os.getpid()}\n".encode())
        if case == "fails" and rank == 1:
            raise ValueError("no more room\nfor the second line")
        if case == "follows" and rank != 1:
            torch.distributed.barrier()  # gloo raises when rank 1 dies
        if case == "ends":
            time.sleep(3 * timeout if rank == 1 else 0.1)
        else:
            with liveness.patience() if case == "patient" else nullcontext():
                time.sleep(WAIT_SECONDS)
    torch.distributed.destroy_process_group()


def main(case: str, timeout: str, run_dir: str, count: str) -> None:
    ranks = {}
    for rank in range(int(count)):
        pid = os.fork()
        if pid == 0:
            be_rank(rank, case, float(timeout), Path(run_dir))
            os._exit(0)
        ranks[pid] = rank
    for _ in ranks:
        pid, status = os.wait()
        os.write(1, f"ended {ranks[pid]} {os.waitstatus_to_exitcode(status)}\n".encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
