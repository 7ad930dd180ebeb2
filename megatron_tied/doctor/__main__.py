"""One rank of `megatron-tied doctor --hostfile`; the command that started it reads what it prints."""

from __future__ import annotations

import os
import sys

from megatron_tied.doctor.examination import CONFIG, examine
from megatron_tied.doctor.findings import Finding, Level, has_errors
from megatron_tied.doctor.launch import NAME as LAUNCH
from megatron_tied.doctor.meeting import Meeting, NotMet
from megatron_tied.doctor.request import END, Request, told_line
from megatron_tied.errors import ConfigError
from megatron_tied.training.config_file import load_config
from megatron_tied.training.launcher import check_launcher, is_first_here

FOUND_ERRORS = 1


def main(argument: str) -> int:
    """Carry out a `Request`; returns the exit code."""
    request = Request.decode(argument)
    rank = os.environ.get("RANK", "0")
    try:
        check_launcher()
    except ConfigError as error:
        return _refuse(error, LAUNCH, "see which variables the launcher, the shell's start files or .deepspeed_env set")
    try:
        config = load_config(request.config, request.overrides) if request.config is not None else None
    except ConfigError as error:
        return _refuse(error, CONFIG, "copy the config file to every host")
    findings: list[Finding] = []
    try:
        with Meeting(request.patience).world() as world:
            for finding in examine(world, config):
                findings.append(finding)
                if rank == "0":
                    _tell(finding)
    except NotMet as error:
        findings = error.findings
        for finding in findings:
            _tell(finding)
    if rank == "0":
        print(END, flush=True)
    return FOUND_ERRORS if has_errors(findings) else 0


def _refuse(error: ConfigError, check: str, remedy: str) -> int:
    """Let the first rank of each host tell every problem; returns the exit code."""
    if is_first_here():
        for problem in error.problems:
            _tell(Finding(check, Level.ERROR, str(problem), (os.uname().nodename,), remedy))
    return FOUND_ERRORS


def _tell(finding: Finding) -> None:
    # In one piece: the lines of all ranks go into one pipe.
    sys.stdout.write(f"{told_line(finding)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    # The launcher puts --local_rank=N before it.
    sys.exit(main(sys.argv[-1]))
