"""The files of `cases/`, each with the options it is patched with; what must come of it lies beside it."""

from __future__ import annotations

from pathlib import Path

CASES = Path(__file__).with_name("cases")

# The golden result of `name.suffix` is `name.patched.suffix`; those below without one are left as they are.
OPTIONS: dict[str, dict[str, object]] = {
    "array.sh": {},
    "quoted.sh": {"group_size": 3, "lr_divisor": "linear"},
    "command.sh": {"group_size": 2, "skip_first": 1},
    "appended.sh": {"group_size": 2, "num_tied_experts": 16},
    "closing.sh": {"group_size": 2, "pipeline": "allreduce"},
    "elements.sh": {"group_size": 2, "skip_first": 0},
    "submitted.sh": {"pattern": "cyclic", "block_size": 2},
    "launched.sh": {"group_size": 2},
    "lines.args": {"banks": (0, 1, 1, 2, 2, 3, 3, 4)},
    "tokens.txt": {},
    "flags.yaml": {"banks": (0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5)},
    "flow.yaml": {"group_size": 2},
    "megatron.yaml": {"banks": (0, 1, 1, 1, 2, 2, 2, 3)},
    "recipe.yaml": {"group_size": 2},
    "ds_config.json": {},
}
SCRIPTS = [name for name in OPTIONS if name.endswith(".sh")]


def source(name: str) -> str:
    """A case before it is patched."""
    return (CASES / name).read_text(encoding="utf-8")


def golden(name: str) -> str:
    """What it must be afterwards."""
    stem, _, suffix = name.rpartition(".")
    path = CASES / f"{stem}.patched.{suffix}"
    return path.read_text(encoding="utf-8") if path.exists() else source(name)
