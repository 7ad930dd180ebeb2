"""Starts real ranks (gloo on CPU) for tests; one launch runs many cases."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.processes import run_to_end

ROOT = Path(__file__).parents[2]


def launch(module: str, world: int, *arguments: str, timeout: float = 900) -> str:
    """Run `python -m module arguments` on `world` ranks under torchrun; returns the output, fails the test on error."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    finished = run_to_end(
        [*command, "--module", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=timeout,
    )
    assert finished.returncode == 0, f"{module} on {world} ranks failed:\n{finished.stdout[-6000:]}"
    return finished.stdout
