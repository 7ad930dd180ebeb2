"""What goes with a model's weights: its Hugging Face config files and its tokenizer, carried along or exchanged."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tied.checkpoint.directory import resolve
from megatron_tied.checkpoint.manifest import BrokenCheckpointError, Manifest
from megatron_tied.convert.hf_config import CarriedJson
from megatron_tied.convert.hf_files import CONFIG, read_json
from megatron_tied.convert.hf_output import kept_keys, write_json
from megatron_tied.convert.hf_source import HuggingFaceSource
from megatron_tied.convert.sources import CheckpointSource
from megatron_tied.convert.tokenizer import NO_TOKENIZER, NO_TOKENS, Special, checked, put_tokenizer, tokenizer_files
from megatron_tied.data.adapters import VOCABULARY, is_tiktoken
from megatron_tied.errors import ConfigError, Problem
from megatron_tied.inference.loading import HF_FILES

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Companions:
    """`config` and `generation` are the original model's files; None where there are none.

    `tokenizer` is a directory, a SentencePiece model or the name of a tiktoken encoding; `special` has its special
    tokens where they, and not those of the files, are the model's.
    """

    config: Path | None
    generation: Path | None
    tokenizer: Path | None
    special: Special

    @classmethod
    def of(cls, base: HuggingFaceSource | CheckpointSource, given: str | None, *, exported: bool) -> Companions:
        """Those of `base`, with the tokenizer `given` by the user in place of its own.

        Raises `ConfigError` for files that are broken or of another model, and where an export would lack a tokenizer.
        """
        directory = _hf_directory(base)
        files = [None if directory is None else directory / name for name in (CONFIG, GENERATION_CONFIG)]
        config, generation = (file if file is not None and file.is_file() else None for file in files)
        for file in (config, generation):
            if file is not None:
                CarriedJson.check(read_json(file), vocab_size=base.vocab_size, file=file.name)
        tokenizer = _tokenizer(base, directory, given, exported=exported)
        field = "--tokenizer" if given else "--input"
        special = {} if tokenizer is None else checked(tokenizer, base.vocab_size, field=field)
        kept = config is not None and given is None
        return cls(config, generation, tokenizer, {} if kept else special)

    def put_beside_checkpoint(self, staging: Path) -> None:
        """Into a checkpoint, from which a later export takes them."""
        if self.config is None and self.generation is None and self.tokenizer is None:
            return
        directory = staging / HF_FILES
        directory.mkdir()
        if self.tokenizer is not None:
            put_tokenizer(self.tokenizer, directory)
        if self.config is not None:
            _put(self.config, directory / CONFIG, self.special)
        if self.generation is not None or _known(self.special):
            self._put_generation_config(directory)

    def put_into_model(self, staging: Path) -> dict[str, Any]:
        """Into a Hugging Face model; returns what they say in its config.json."""
        if self.tokenizer is not None:
            put_tokenizer(self.tokenizer, staging)
        self._put_generation_config(staging)
        original = {} if self.config is None else kept_keys(read_json(self.config))
        return NO_TOKENS | original | self.special

    def _put_generation_config(self, directory: Path) -> None:
        if self.generation is not None:
            _put(self.generation, directory / GENERATION_CONFIG, self.special)
        else:
            write_json(directory / GENERATION_CONFIG, _known(self.special))


def _put(file: Path, target: Path, special: Special) -> None:
    if special:
        others = {key: value for key, value in read_json(file).items() if key not in special}
        write_json(target, others | _known(special))
    else:
        shutil.copyfile(file, target)


def _known(special: Special) -> dict[str, int]:
    return {key: value for key, value in special.items() if value is not None}


def _tokenizer(
    base: HuggingFaceSource | CheckpointSource, directory: Path | None, given: str | None, *, exported: bool
) -> Path | None:
    if given == NO_TOKENIZER:
        return None
    if given is not None:
        if not _is_there(given):
            raise ConfigError(Problem("--tokenizer", given, "is not there"))
        return _directory_of(given)
    if directory is not None and tokenizer_files(directory):
        return directory
    if not exported:
        return None
    trained_with = base.manifest.run["data"].get("tokenizer") if isinstance(base, CheckpointSource) else None
    if trained_with and _is_there(trained_with):
        return _directory_of(trained_with)
    where = f"the run's {trained_with} is not there" if trained_with else f"{base.directory} has none"
    valid = f"must be given, a directory or a SentencePiece model, since {where}; or {NO_TOKENIZER}"
    raise ConfigError(Problem("--tokenizer", None, valid))


def _is_there(tokenizer: str) -> bool:
    return is_tiktoken(tokenizer) or Path(tokenizer).exists()


def _directory_of(tokenizer: str) -> Path:
    """A Hugging Face tokenizer goes with the files beside its tokenizer.json."""
    path = Path(tokenizer)
    return path.parent if path.name == VOCABULARY else path


def _hf_directory(base: HuggingFaceSource | CheckpointSource) -> Path | None:
    """Where the Hugging Face files of `base` are: its own, or of the conversion that its first run began with."""
    if isinstance(base, HuggingFaceSource):
        return base.directory
    pending, seen = [(base.directory, base.manifest)], set()
    while pending:
        checkpoint, manifest = pending.pop()
        if (checkpoint / HF_FILES).is_dir():
            return checkpoint / HF_FILES
        seen.add(checkpoint.resolve())
        for place in _begun_with(checkpoint, manifest.run["train"]):
            try:
                earlier = resolve(place)
                if earlier.resolve() not in seen:
                    pending.append((earlier, Manifest.read(earlier)))
            except BrokenCheckpointError:  # it is no longer there
                continue
    return None


def _begun_with(checkpoint: Path, train: dict[str, Any]) -> Iterator[Path]:
    """The checkpoints or runs that this one's run began with, as their paths are meant."""
    started_in = _started_in(checkpoint, Path(train.get("run_dir", "")))
    for named in (train.get("init_from"), train.get("resume")):
        if named not in (None, "auto", "never"):
            yield from (place for place in (started_in / named, Path(named)) if place.exists())


def _started_in(checkpoint: Path, run_dir: Path) -> Path:
    """The working directory of the run, as far as the place of its checkpoint tells it."""
    found = checkpoint.resolve().parent.parent
    depth = len(run_dir.parts)
    is_told = depth and not run_dir.is_absolute() and found.parts[-depth:] == run_dir.parts
    return found.parents[depth - 1] if is_told else Path()
