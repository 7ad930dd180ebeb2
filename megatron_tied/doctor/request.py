"""What the command and the ranks that it starts on other hosts tell each other, through launcher, ssh and shells."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import asdict, dataclass

from megatron_tied.doctor.findings import Finding

_FINDING = "megatron-tied-finding"
END = "megatron-tied-findings-end"
# pdsh writes the name of the host before each line.
_LINE = re.compile(rf"(?:\S+: )?{_FINDING} (\{{.*\}})\s*")


@dataclass(frozen=True)
class Request:
    """What to examine: the path of a config on every host (None: no config), its overrides, and how many seconds hosts
    may take to come together."""

    config: str | None
    overrides: list[str]
    patience: float

    def encode(self) -> str:
        """As one word of letters, digits, - and _, in which no shell on the way finds anything to do."""
        return base64.urlsafe_b64encode(json.dumps(asdict(self)).encode()).decode().rstrip("=")

    @classmethod
    def decode(cls, word: str) -> Request:
        """What `encode` made."""
        return cls(**json.loads(base64.urlsafe_b64decode(word + "=" * (-len(word) % 4))))


def told_line(finding: Finding) -> str:
    """A finding as a line of output."""
    return f"{_FINDING} {json.dumps(finding.to_json())}"


def read_line(line: str) -> Finding | None:
    """The finding in a line of output; None for any other line."""
    match = _LINE.fullmatch(line.rstrip("\n"))
    try:
        return Finding.from_json(json.loads(match[1])) if match else None
    except (KeyError, TypeError, ValueError):
        return None
