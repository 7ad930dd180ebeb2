"""What has to be known of a checkpoint before text is made with its model."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_tied.data.adapters import Tokenizer, load_tokenizer
from megatron_tied.errors import ConfigError, Problem
from megatron_tied.inference.loading import TrainedModel


def tokenizer_of(found: TrainedModel, given: str | Path | None = None, *, field: str = "tokenizer") -> Tokenizer:
    """The tokenizer `given`, or else that of the training. Raises `ConfigError` about `field` where none fits."""
    path = given or found.tokenizer
    if path is None:
        trained_with = found.run["data"].get("tokenizer")
        why = f"that of the training, {trained_with}, is not here" if trained_with else "the checkpoint names none"
        raise ConfigError(Problem(field, None, f"must be given: {why}"))
    tokenizer = load_tokenizer(path, field=field)
    if tokenizer.vocab_size > found.vocab_size:
        valid = f"has {tokenizer.vocab_size} tokens, and the model knows {found.vocab_size}"
        raise ConfigError(Problem(field, str(path), valid))
    return tokenizer


def launcher_problems() -> list[Problem]:
    """Several processes, where one is wanted."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    return [Problem("WORLD_SIZE", processes, "must be 1: start it without a launcher")] if processes > 1 else []
