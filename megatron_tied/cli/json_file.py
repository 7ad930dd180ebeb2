"""The files that `--json FILE` asks for."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.files import write_whole


def check_place(path: Path | None) -> None:
    """Raise `ConfigError` about `--json` if no file can be written there; None is no file."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise ConfigError(Problem("--json", str(path), "must be in a directory that is there"))
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(Problem("--json", str(path), "must be a file that can be written"))


def write_json(path: Path, content: Mapping[str, object]) -> bool:
    """Write `content`; whether that went well, and if not, the reason is told."""
    try:
        write_whole(path, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        print(f"error: --json {path} could not be written: {error.strerror}", file=sys.stderr)
        return False
    return True
