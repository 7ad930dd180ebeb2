"""How many token ids a run's model knows."""

from __future__ import annotations

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.training.config import RunConfig


def vocabulary_size(config: RunConfig) -> int:
    """What the model section says, or else the tokenizer's. Raises `ConfigError` for neither, or for no tokenizer."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    if config.data.tokenizer is None:
        raise ConfigError(Problem("model.vocab_size", None, "must be given, or else data.tokenizer"))
    from megatron_tied.data.adapters import load_tokenizer

    return load_tokenizer(config.data.tokenizer, field="data.tokenizer").vocab_size


def with_vocabulary(config: RunConfig) -> RunConfig:
    """The same config, its model section naming the size of the vocabulary. Raises `ConfigError` as above."""
    model = config.model.model_copy(update={"vocab_size": vocabulary_size(config)})
    return config.model_copy(update={"model": model})
