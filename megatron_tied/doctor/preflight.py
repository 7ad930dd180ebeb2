"""`--preflight`: the checks by the ranks of a run itself, before anything is built."""

from __future__ import annotations

import os
import sys
import time

from rich.console import Console

from megatron_tied.bad_input import PATIENCE_SECONDS
from megatron_tied.doctor.examination import examine
from megatron_tied.doctor.findings import Finding, has_errors
from megatron_tied.doctor.meeting import Meeting, NotMet
from megatron_tied.doctor.report import report
from megatron_tied.training.config import RunConfig

_PATIENCE_SECONDS = 60.0  # for hosts that are slow to load torch
_WIDTH = 120


def preflight(config: RunConfig) -> Meeting | None:
    """Check all hosts and tell what was found, once; None, on every rank, if the run is not to start.

    The meeting is to be kept until training has one of its own.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        meeting = Meeting(_PATIENCE_SECONDS)
        with meeting.world() as world:
            findings = list(examine(world, config))
    except NotMet as error:
        _tell(error.findings)
        _wait_unless(bool(error.findings))
        return None
    if is_first:
        _tell(findings)
    if not has_errors(findings):
        return meeting
    _wait_unless(is_first)
    return None


def _tell(findings: list[Finding]) -> None:
    if findings:
        Console(file=sys.stderr, highlight=False, width=None if sys.stderr.isatty() else _WIDTH).print(report(findings))


def _wait_unless(told_here: bool) -> None:
    # The launcher ends all ranks of a host with the first that ends: that has to be one that has told.
    if not told_here:
        time.sleep(PATIENCE_SECONDS)
