"""What can be wrong with the data of a run, found from the files' heads before any model is built."""

from __future__ import annotations

import hashlib
import math
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_tied.data.adapters import load_tokenizer
from megatron_tied.data.metadata import Index, Metadata, largest_token_id, with_suffix
from megatron_tied.errors import ConfigError, Problem

Span = tuple[float, float]
BlendSpec = str | Path | Sequence[float | str | Path]


@dataclass(frozen=True)
class Blend:
    """Data sets to mix, by prefix; `weights` is None for a single one, which is not mixed."""

    prefixes: tuple[Path, ...]
    weights: tuple[float, ...] | None


class Spans(NamedTuple):
    """Which part of every data set's documents is for what."""

    train: Span
    validation: Span


def parse_blend(value: BlendSpec, field: str) -> Blend:
    """Read one prefix or `[weight, prefix, weight, prefix, ...]`. Raises `ConfigError` about `field`."""
    if isinstance(value, str | Path):
        return Blend((Path(value).absolute(),), None)
    valid = "must be a prefix or a list of pairs such as [0.75, PREFIX_A, 0.25, PREFIX_B]"
    if not value or len(value) % 2:
        raise ConfigError(Problem(field, value, valid))
    weights: list[float] = []
    prefixes: list[Path] = []
    problems: list[Problem] = []
    for weight, prefix in zip(value[::2], value[1::2], strict=True):
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            problems.append(Problem(field, weight, f"{valid}; a weight must be a number > 0"))
        else:
            weights.append(float(weight))
        if isinstance(prefix, str | Path):
            prefixes.append(Path(prefix).absolute())
        else:
            problems.append(Problem(field, prefix, f"{valid}; a prefix must be a path"))
    if problems:
        raise ConfigError(problems)
    return Blend(tuple(prefixes), tuple(weights) if len(weights) > 1 else None)


def parse_split(split: str | None) -> Spans:
    """Spans of a string such as "98,2,0" (train, validation, test); all is train when it is None.

    Raises `ConfigError` about `data.split`.
    """
    if split is None:
        return Spans((0.0, 1.0), (1.0, 1.0))
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or not all(0 <= share < math.inf for share in shares) or not shares[0]:
        valid = 'must be up to three numbers >= 0 such as "98,2,0" (train > 0, validation, test)'
        raise ConfigError(Problem("data.split", split, valid))
    train, with_validation = (sum(shares[:count]) / sum(shares) for count in (1, 2))
    return Spans((0.0, train), (train, with_validation))


def cache_directory(cache_dir: str | Path | None, train: Blend) -> Path:
    """Where index caches go: `cache_dir`, or a directory beside the first training data set."""
    return Path(cache_dir or train.prefixes[0].parent / "index_cache").absolute()


def check_data(
    *,
    train: BlendSpec,
    validation: BlendSpec | None,
    split: str | None,
    tokenizer: str | Path | None,
    cache_dir: str | Path | None,
    vocab_size: int,
    seq_length: int,
    evaluates: bool,
) -> list[Problem]:
    """Every problem of a run's data, empty when it is sound. Needs one process, and no torch.

    `vocab_size` and `seq_length` are the model's; a run that never `evaluates` needs no held-out samples. A data set
    that Megatron's own tools made has no metadata, so all its ids are read, once: the largest is remembered in the
    cache directory.
    """
    problems: list[Problem] = []
    blends: dict[str, Blend] = {}
    for field, spec in (("data.train", train), ("data.validation", validation)):
        if spec is not None:
            try:
                blends[field] = parse_blend(spec, field)
            except ConfigError as error:
                problems += error.problems
    if split is not None and validation is not None:
        problems.append(Problem("data.split", split, "must be left out when data.validation is given"))
    try:
        spans = parse_split(split)
    except ConfigError as error:
        problems += error.problems
    if problems:
        return problems
    cache = cache_directory(cache_dir, blends["data.train"])
    if not _is_writable(cache):
        valid = "must be a directory that can be written; set data.cache_dir to one"
        problems.append(Problem("data.cache_dir", str(cache), valid))
    data_sets: list[_DataSet] = []
    for field, blend in blends.items():
        for prefix in blend.prefixes:
            found, data_set = _open(field, prefix)
            problems += found
            if data_set is not None:
                data_sets.append(data_set)
                uses = _uses(data_set.field, spans, is_split=split is not None, evaluates=evaluates)
                problems += _length_problems(data_set, uses, split, seq_length)
    problems += _vocabulary_problems(data_sets, tokenizer, vocab_size, cache)
    return problems


@dataclass(frozen=True)
class _DataSet:
    field: str
    prefix: Path
    index: Index
    metadata: Metadata | None

    def largest_id(self, cache: Path) -> int:
        if self.metadata is not None:
            return self.metadata.max_token_id
        stat = with_suffix(self.prefix, ".bin").stat()
        key = hashlib.sha256(f"{self.prefix} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
        remembered = cache / f"largest_id_{key}"
        try:
            return int(remembered.read_text())
        except (OSError, ValueError):
            largest = largest_token_id(self.prefix, self.index.dtype)
        if _is_writable(cache):
            cache.mkdir(parents=True, exist_ok=True)
            draft = cache / f".{remembered.name}.{uuid.uuid4().hex}"
            draft.write_text(str(largest))
            draft.replace(remembered)
        return largest


def _open(field: str, prefix: Path) -> tuple[list[Problem], _DataSet | None]:
    files = [with_suffix(prefix, suffix) for suffix in (".bin", ".idx")]
    if missing := [path for path in files if not path.is_file()]:
        is_file_name = prefix.suffix in (".bin", ".idx", ".json")
        hint = f"; give the prefix, without {prefix.suffix}" if is_file_name else ""
        return [Problem(field, str(prefix), f"needs the file {path}{hint}") for path in missing], None
    try:
        metadata = Metadata.read(prefix)
    except ValueError as error:
        return [Problem(field, str(prefix), f"{prefix}.json {error}")], None
    try:
        index = Index.read(prefix)
    except ValueError as error:
        return [Problem(field, str(prefix), f"{prefix}.idx {error}")], None
    if metadata is not None and metadata.tokens != index.tokens:
        valid = f"{prefix}.json tells of {metadata.tokens} tokens, {prefix}.idx of {index.tokens}"
        return [Problem(field, str(prefix), valid)], None
    return [], _DataSet(field, prefix, index, metadata)


def _uses(field: str, spans: Spans, *, is_split: bool, evaluates: bool) -> dict[str, Span]:
    """What samples are taken of a data set for, and from which part of its documents."""
    uses = {field: (0.0, 1.0)}
    if is_split:
        uses = {f"data.{use}": span for use, span in spans._asdict().items() if span[0] < span[1]}
    return {use: span for use, span in uses.items() if evaluates or use != "data.validation"}


def _length_problems(
    data_set: _DataSet, uses: dict[str, Span], split: str | None, seq_length: int
) -> Iterator[Problem]:
    """Too little data for one sample, in which case Megatron-Core's index builder would not end."""
    lengths = data_set.index.lengths
    for use, span in uses.items():
        begin, end = (round(part * len(lengths)) for part in span)
        tokens = int(lengths[begin:end].sum(dtype=np.int64))
        if split is not None and begin == end:
            valid = f"leaves none of the {len(lengths)} documents of {data_set.prefix} for {use}"
            yield Problem("data.split", split, valid)
        elif tokens < seq_length + 1:
            valid = f"must be <= {max(tokens - 1, 0)}: {use} has only {tokens} tokens of {data_set.prefix}"
            yield Problem("train.seq_length", seq_length, valid)


def _vocabulary_problems(
    data_sets: Sequence[_DataSet], tokenizer: str | Path | None, vocab_size: int, cache: Path
) -> Iterator[Problem]:
    chosen = None
    if tokenizer is not None:
        try:
            chosen = load_tokenizer(tokenizer, field="data.tokenizer")
        except ConfigError as error:
            yield from error.problems
    made_by = [(found.prefix, found.metadata.tokenizer_sha256) for found in data_sets if found.metadata is not None]
    for data_set in data_sets:
        metadata = data_set.metadata
        largest = data_set.largest_id(cache)
        if largest >= vocab_size:
            valid = f"must be >= {largest + 1}: {data_set.prefix} holds token id {largest}"
            yield Problem("model.vocab_size", vocab_size, valid)
        if metadata is None:
            if chosen is not None and largest >= chosen.vocab_size:
                valid = f"has {chosen.vocab_size} tokens, but {data_set.prefix} holds token id {largest}"
                yield Problem("data.tokenizer", str(tokenizer), valid)
        elif chosen is not None and metadata.tokenizer_sha256 != chosen.sha256:
            made_with = f"{metadata.tokenizer}, sha256 {metadata.tokenizer_sha256[:12]}..."
            valid = f"must be the tokenizer that made {data_set.prefix} ({made_with})"
            yield Problem("data.tokenizer", str(tokenizer), valid)
        elif metadata.tokenizer_sha256 != made_by[0][1]:
            valid = f"must have been made with the same tokenizer as {made_by[0][0]}"
            yield Problem(data_set.field, str(data_set.prefix), valid)


def _is_writable(directory: Path) -> bool:
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
