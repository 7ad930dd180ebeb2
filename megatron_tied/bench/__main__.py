"""One rank of `megatron-tied bench`; the command that started it reads what the first rank prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_tied.bad_input import BAD_INPUT
from megatron_tied.bench.job import Job
from megatron_tied.bench.measurement import measure, measure_alone
from megatron_tied.bench.messages import result_of, told_line
from megatron_tied.bench.progress import Done
from megatron_tied.bench.ranks import is_first, together
from megatron_tied.errors import ConfigError, Problem


def main(path: str) -> int:
    """Carry out the job in the file `path`; returns the exit code."""
    job = Job.decode(Path(path).read_text(encoding="utf-8"))
    try:
        with together(job.config):
            result = measure(job, _tell) if job.alone is None else measure_alone(job, job.alone)
    except ConfigError as error:
        _tell(error.problems)
        return BAD_INPUT
    if is_first():
        # Not among the lines of all ranks, of which a long one can be torn.
        result_of(Path(path)).write_text(json.dumps(result), encoding="utf-8")
    return 0


def _tell(said: Done | Sequence[Problem]) -> None:
    if not is_first():
        return
    # Short, and in one piece: the lines of all ranks go into one pipe.
    sys.stdout.write(f"\n{told_line(said)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
