"""Starts the checks on all hosts of a hostfile, by the launcher that will start the training."""

from __future__ import annotations

import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megatron_tied.doctor.findings import Finding, Level, has_errors
from megatron_tied.doctor.request import END, Request, read_line

NAME = "launch"
_LAST_LINES = 30
_PATIENCE_SECONDS = 30


def examine_hosts(hostfile: Path, request: Request, launcher_options: Sequence[str]) -> tuple[list[Finding], list[str]]:
    """What all hosts find, and the last lines that were printed beside, for when they came to no end."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), *launcher_options]
    command += ["--module", "megatron_tied.doctor", request.encode()]
    findings: list[Finding] = []
    others: deque[str] = deque(maxlen=_LAST_LINES)
    ended = False
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    try:
        for line in launcher.stdout or ():
            finding = read_line(line)
            ended = ended or line.rstrip().endswith(END)
            if finding is not None:
                findings.append(finding)
            else:
                others.append(line.rstrip("\n"))
        code = launcher.wait()
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt):
            launcher.terminate()
        # Else the terminal has told it, too: it ends what it has started on the hosts. What it still says is read.
        with suppress(subprocess.TimeoutExpired):
            launcher.communicate(timeout=_PATIENCE_SECONDS)
        launcher.kill()
        raise
    if ended and (code == 0 or has_errors(findings)):
        return findings, []
    what = f"the checks did not come to their end on the hosts: the launcher ended with exit code {code}"
    remedy = "see its last lines; try by hand: ssh HOST hostname, for every host of the hostfile"
    return [*findings, Finding(NAME, Level.ERROR, what, (), remedy)], list(others)
