"""What a patch is to write: the tie options that the user gave, in the words of flags and of keys."""

from __future__ import annotations

from argparse import ArgumentError, ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.megatron_lm.arguments import NAMES, add_tie_arguments, flag, in_flags, tie_config
from megatron_tied.topology import TieConfig

GROUP_SIZE = 4  # where the user gives none

TIE_FLAGS = tuple(map(flag, NAMES.values()))


@dataclass(frozen=True)
class TieRequest:
    """The tie groups asked for, and which of TieConfig's fields a file is to state."""

    tie: TieConfig
    stated: Sequence[str]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> TieRequest:
        """From the fields that the user gave. Raises ConfigError if they are wrong in themselves, or tie nothing."""
        chosen = dict(given)
        if chosen.get("banks") is None:
            chosen.setdefault("group_size", GROUP_SIZE)
        tie = TieConfig(**chosen)
        if problems := tie.problems():
            raise ConfigError(problems)
        if tie.group_size == 1 and tie.banks is None:
            raise ConfigError(Problem("tie.group_size", 1, "must be at least 2: 1 ties nothing"))
        return cls(tie, [field.name for field in fields(TieConfig) if field.name in chosen])

    def flags(self) -> dict[str, str]:
        """The flags to write and their values, as words of a command."""
        return {flag(NAMES[name]): _word(getattr(self.tie, name)) for name in self.stated}

    def keys(self) -> dict[str, str]:
        """The keys to write and their values, as YAML."""
        return {NAMES[name]: _scalar(getattr(self.tie, name)) for name in self.stated}

    def tie_of(self, found: Mapping[str, str | None]) -> TieConfig:
        """The tie groups of a file that has the flags `found`: its own, if they are known, else those asked for."""
        if not found or None in found.values():
            return self.tie
        parser = add_tie_arguments(ArgumentParser(exit_on_error=False))
        try:
            tie = tie_config(parser.parse_args([f"{name}={value}" for name, value in found.items()]))
        except ArgumentError as error:
            name = error.argument_name or ""
            raise ConfigError(Problem(name, found.get(name), f"cannot be read: {error.message}")) from None
        if problems := tie.problems():
            raise ConfigError(map(in_flags, problems))
        return tie

    def missing_from(self, found: Mapping[str, str | None]) -> dict[str, str]:
        """The flags that a file lacks which has `found` already; None: a value that cannot be known.

        Raises ConfigError for each that contradicts what is asked for.
        """
        wanted = self.flags()
        defaults = {flag(name): _word(getattr(TieConfig(), field)) for field, name in NAMES.items()}
        if contradictions := [
            Problem(name, found.get(name, f"{defaults[name]} (default)"), _contradiction(value))
            for name, value in wanted.items()
            if found and not _same(value, found.get(name, defaults[name]))
        ]:
            raise ConfigError(contradictions)
        return {} if found else wanted


def _contradiction(value: str) -> str:
    return f"is what this file ties by already, but {value} is asked for: change it there, or ask for the same"


def _same(wanted: str, found: str | None) -> bool:
    return found is not None and _compared(wanted) == _compared(found)


def _compared(text: str) -> list[str]:
    """The parts of a value; numbers alike however they are written."""
    parts = text.replace(",", " ").split()
    return [f"{float(part)}" if part.replace(".", "", 1).isdecimal() else part for part in parts]


def _word(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _scalar(value: object) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
