"""What a patched tree knows of its patch: enough to check it and take it out, whatever version of us comes by."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import megatron_tied
from megatron_tied.errors import ConfigError, Problem
from megatron_tied.files import write_whole
from megatron_tied.patching.source_patch import SourcePatch

RECORD = ".megatron_tied_patch.json"


@dataclass(frozen=True)
class Record:
    """A patch, the version of megatron-tied that applied it, and when (UTC)."""

    patch: SourcePatch
    by: str
    date: str

    @classmethod
    def of_today(cls, patch: SourcePatch) -> Record:
        """The record of a patch that is applied now, by this version."""
        return cls(patch, megatron_tied.__version__, datetime.now(UTC).isoformat(timespec="seconds"))

    def write(self, tree: Path) -> None:
        """Put the record into the root of `tree`, in one step. Raises OSError."""
        told = {"tag": self.patch.tag, "megatron_tied": self.by, "date": self.date}
        content = {**told, "patch": self.patch.entry(), "diff": self.patch.diff()}
        write_whole(tree / RECORD, json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, tree: Path) -> Record | None:
        """The record of `tree`, if it has one. Raises ConfigError for one that cannot be read."""
        try:
            told = json.loads((tree / RECORD).read_text(encoding="utf-8"))
            patch = SourcePatch.parse(told["tag"], told["patch"], told["diff"])
            return cls(patch, told["megatron_tied"], told["date"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            valid = f"is no record that this version can read ({error!r}): remove it, and what is patched is found anew"
            raise ConfigError(Problem(RECORD, str(tree), valid)) from None
