"""How findings are shown: a table with one line for each check, then what is to be done."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_tied.doctor.findings import Finding, Level, has_errors
from megatron_tied.errors import listed

_MARKS = {Level.OK: ("✓", "green"), Level.WARNING: ("!", "yellow"), Level.ERROR: ("✗", "red")}
_SEVERITY = list(_MARKS)


def report(findings: Sequence[Finding]) -> RenderableType:
    """The table and, below it, the findings that ask for something."""
    by_check: dict[str, list[Finding]] = {}
    for finding in findings:
        by_check.setdefault(finding.check, []).append(finding)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for check, of_check in by_check.items():
        worst = max((finding.level for finding in of_check), key=_SEVERITY.index)
        fine = [finding.what for finding in of_check if finding.level is Level.OK]
        if found := len(of_check) - len(fine):
            fine.insert(0, f"{found} finding{'s' * (found > 1)}, see below")
        table.add_row(_mark(worst), check, Text("\n".join(fine)))
    told = [_told(finding) for level in reversed(_SEVERITY[1:]) for finding in findings if finding.level is level]
    return Group(table, *(part for finding in told for part in (Text(), finding)))


def as_json(findings: Sequence[Finding]) -> str:
    """One object, `passed` and `findings`, for programs."""
    told = {"passed": not has_errors(findings), "findings": [finding.to_json() for finding in findings]}
    return json.dumps(told, indent=2, ensure_ascii=False)


def _mark(level: Level) -> Text:
    mark, style = _MARKS[level]
    return Text(mark, style=f"bold {style}")


def _told(finding: Finding) -> Text:
    told = Text.assemble(_mark(finding.level), f" {finding.check}: {finding.what}")
    if finding.hosts:
        told.append(f"\n  hosts: {listed(finding.hosts, 16)}")
    if finding.remedy:
        told.append(f"\n  to do: {finding.remedy}")
    return told
