"""The held-out data sets of an evaluation, one for each domain, checked before a model is built."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from megatron_tied.data.adapters import Tokenizer, load_tokenizer
from megatron_tied.data.metadata import Metadata, describe, with_suffix
from megatron_tied.errors import ConfigError, Problem
from megatron_tied.inference.loading import TrainedModel
from megatron_tied.training.evaluation import Inputs


@dataclass(frozen=True)
class Domain:
    """A data set, of which the `predicted` tokens after the first are to be predicted, each once."""

    name: str
    prefix: Path
    dtype: np.dtype
    predicted: int

    def windows(self, seq_length: int) -> int:
        """How many sequences of `seq_length` it takes; the last may be filled in part."""
        return -(-self.predicted // seq_length)

    def inputs(self, first: int, count: int, seq_length: int) -> Inputs:
        """`count` windows from number `first` on; beyond the end no token counts.

        Documents follow each other as in training: window i predicts the tokens from i x `seq_length` + 1 on.
        """
        starts = np.arange(first, first + count)[:, None] * seq_length
        places = starts + np.arange(seq_length + 1)
        ids = torch.from_numpy(self._ids[np.minimum(places, self.predicted)].astype(np.int64))
        counts = torch.from_numpy((places[:, 1:] <= self.predicted).astype(np.float32))
        positions = torch.arange(seq_length).expand(count, seq_length)
        return Inputs(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), positions, counts)

    def largest_id(self) -> int:
        """Of all tokens that are read."""
        return int(self._ids.max())

    @cached_property
    def _ids(self) -> np.ndarray:
        return np.memmap(with_suffix(self.prefix, ".bin"), self.dtype, "r", shape=(self.predicted + 1,))


def read_domains(named: Sequence[str], found: TrainedModel, *, max_tokens: int | None) -> list[Domain]:
    """The domains of `named`, each PREFIX or NAME=PREFIX, of which at most `max_tokens` tokens are predicted.

    Raises `ConfigError` with all that is wrong: data that is not there, too short, or made with another tokenizer than
    that of the model.
    """
    tokenizer = None
    if found.tokenizer is not None:
        tokenizer = load_tokenizer(found.tokenizer, field="data.tokenizer")
    domains: list[Domain] = []
    problems: list[Problem] = []
    for argument in named:
        try:
            domains.append(_read(argument, found, tokenizer, max_tokens))
        except (OSError, ValueError) as error:
            problems.append(Problem("--data", argument, str(error)))
    problems += _same_names(domains)
    if problems:
        raise ConfigError(problems)
    return domains


def _read(argument: str, found: TrainedModel, tokenizer: Tokenizer | None, max_tokens: int | None) -> Domain:
    name, prefix = _named(argument)
    index, metadata = describe(prefix)
    if index.tokens < 2:
        raise ValueError(f"must have 2 tokens or more, not {index.tokens}")
    if metadata is not None:
        _check_tokenizer(metadata, found, tokenizer)
    domain = Domain(name, prefix, index.dtype, min(index.tokens - 1, max_tokens or index.tokens))
    if (largest := domain.largest_id()) >= found.vocab_size:
        raise ValueError(f"has token id {largest}, and the model knows those below {found.vocab_size}")
    return domain


def _named(argument: str) -> tuple[str, Path]:
    name, is_named, prefix = argument.partition("=")
    if (is_named and not prefix) or not argument:
        raise ValueError("must be PREFIX or NAME=PREFIX")
    if is_named and name and "/" not in name:
        return name, Path(prefix)
    return Path(argument).name, Path(argument)


def _check_tokenizer(metadata: Metadata, found: TrainedModel, tokenizer: Tokenizer | None) -> None:
    if tokenizer is not None and metadata.tokenizer_sha256 != tokenizer.sha256:
        raise ValueError(f"must have been made with the model's tokenizer, {found.tokenizer}, not {metadata.tokenizer}")
    if metadata.vocab_size > found.vocab_size:
        raise ValueError(f"was made for {metadata.vocab_size} token ids, and the model has {found.vocab_size}")


def _same_names(domains: Sequence[Domain]) -> Iterable[Problem]:
    names = [domain.name for domain in domains]
    for domain in domains:
        if names.count(domain.name) > 1:
            valid = f"must be the only one of the name {domain.name}: give it another by NAME={domain.prefix}"
            yield Problem("--data", str(domain.prefix), valid)
