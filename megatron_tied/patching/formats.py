"""Which kind of file this is, by its name and, where that does not tell, by what it begins with."""

from __future__ import annotations

import re
from enum import Enum, auto
from pathlib import Path

from megatron_tied.errors import ConfigError, Problem


class Format(Enum):
    """A file's format: how it is read, and how ours is written into it."""

    SHELL = auto()
    ARGUMENTS = auto()
    YAML = auto()
    JSON = auto()


_BY_SUFFIX = {
    ".json": Format.JSON,
    ".hjson": Format.JSON,
    ".yaml": Format.YAML,
    ".yml": Format.YAML,
    ".sh": Format.SHELL,
    ".bash": Format.SHELL,
    ".slurm": Format.SHELL,
    ".sbatch": Format.SHELL,
}
_OTHERS = frozenset({".ipynb", ".md", ".py", ".rst", ".toml"})


def format_of(path: Path, text: str) -> Format:
    """The format of the file `path`. Raises ConfigError for an empty file, and for one of another kind."""
    lines = (line.strip() for line in text.splitlines())
    first = next((line for line in lines if line and not line.startswith("#")), None)
    if first is None:
        raise ConfigError(Problem("FILE", str(path), "must be a launch script or a config: there is nothing in it"))
    if path.suffix in _OTHERS:
        valid = "must be a launch script, a file of arguments, YAML, or a ds_config"
        raise ConfigError(Problem("FILE", str(path), valid))
    if path.suffix in _BY_SUFFIX:
        return _BY_SUFFIX[path.suffix]
    if first.startswith("{"):
        return Format.JSON
    if first.startswith("--") and not text.startswith("#!"):
        return Format.ARGUMENTS
    return Format.YAML if re.match(r"[\w.-]+:(\s|$)|---$", first) else Format.SHELL
