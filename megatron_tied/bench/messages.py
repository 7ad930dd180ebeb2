"""What the ranks of a benchmark tell the command that started them, line by line on standard output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_MARK = "megatron-tied-bench "
PROGRESS, PROBLEMS = "progress", "problems"


def result_of(job: Path) -> Path:
    """Where the first rank writes what it found, as JSON, for the job in the file `job`."""
    return job.with_name("result.json")


def told_line(kind: str, content: Any) -> str:
    """A message as one line of output."""
    return f"{_MARK}{json.dumps([kind, content])}"


def read_line(line: str) -> tuple[str, Any] | None:
    """The kind and content of a message; None for any other line."""
    _, mark, text = line.partition(_MARK)
    if not mark:
        return None
    try:
        kind, content = json.loads(text)
    except ValueError:
        return None
    return kind, content
