"""What the ranks of a benchmark tell the command that started them, line by line on standard output."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_tied.bench.progress import Done
from megatron_tied.errors import Problem

_DONE, _PROBLEMS = "megatron-tied-bench-done ", "megatron-tied-bench-problems "


def result_of(job: Path) -> Path:
    """Where the first rank writes what it found, as JSON, for the job in the file `job`."""
    return job.with_name("result.json")


def told_line(said: Done | Sequence[Problem]) -> str:
    """A message as one line of output; of a problem's value only how it is written arrives."""
    if isinstance(said, Done):
        return _DONE + json.dumps(said)
    return _PROBLEMS + json.dumps([(problem.field, str(problem.value), problem.valid) for problem in said])


def read_line(line: str) -> Done | list[Problem] | None:
    """The message in a line of output; None for any other line."""
    try:
        if _DONE in line:
            return Done(*json.loads(line.partition(_DONE)[2]))
        if _PROBLEMS in line:
            return [Problem(*problem) for problem in json.loads(line.partition(_PROBLEMS)[2])]
    except (ValueError, TypeError):  # torn by another rank's
        return None
    return None
