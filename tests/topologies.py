"""What `tie` makes of twelve layers, as the README shows it."""

from __future__ import annotations

import dataclasses

from megatron_tied.topology import TieConfig, TieTopology

_LAYERS = 12
_SHOWN = (
    TieConfig(group_size=4),
    TieConfig(group_size=3),
    TieConfig(group_size=4, skip_first=0, skip_last=0),
    TieConfig(group_size=2, pattern="cyclic", block_size=2),
    TieConfig(banks=[0, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 3]),
)


def table() -> str:
    """Markdown: a row for each of some settings."""
    lines = ["| `tie` | layers; in brackets those that share a bank |", "|---|---|"]
    for tie in _SHOWN:
        said = (field for field in dataclasses.fields(tie) if getattr(tie, field.name) != field.default)
        keys = ", ".join(f"{field.name}: {_yaml(getattr(tie, field.name))}" for field in said)
        layers = TieTopology.build(tie, _LAYERS).describe().partition(": ")[2]
        lines.append(f"| `{{{keys}}}` | `{layers}` |")
    return "\n".join(lines) + "\n"


def _yaml(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
