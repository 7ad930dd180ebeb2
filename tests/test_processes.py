"""A command that hangs is ended with all that it has started, and shows where it hung."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import psutil
import pytest

from tests.processes import run_to_end

HANGS = (
    "import os, time\nprint(os.getpid(), flush=True)\ndef in_a_collective():\n    time.sleep(1000)\nin_a_collective()"
)


def test_where_it_hangs(tmp_path: Path) -> None:
    starts = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {HANGS!r}])"
    with pytest.raises(AssertionError, match="has not ended in 3 s") as raised:
        run_to_end([sys.executable, "-c", starts], cwd=tmp_path, env=os.environ, timeout=3)
    told = str(raised.value)
    assert "line 4 in in_a_collective" in told
    assert not psutil.pid_exists(int(re.search(r"^(\d+)$", told, re.MULTILINE)[1]))
