"""Calibration text: some sequences of an indexed data set, spread over all of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from megatron_tied.data.metadata import describe, with_suffix
from megatron_tied.errors import ConfigError, Problem

_SEED = 0


def calibration_tokens(prefix: Path, *, tokens: int, length: int, vocab_size: int) -> torch.Tensor:
    """About `tokens` tokens of the data set `prefix`, int64 [sequences, length]; always the same.

    A smaller data set is taken whole. Raises `ConfigError` for one that cannot be read, has less than a sequence, or
    has token ids that a model of `vocab_size` does not know.
    """
    try:
        index, metadata = describe(prefix)
    except (OSError, ValueError) as error:
        raise _refused(prefix, str(error)) from None
    if metadata is not None and metadata.vocab_size > vocab_size:
        raise _refused(prefix, f"was made for {metadata.vocab_size} token ids, and the model has {vocab_size}")
    available = index.tokens // length
    if available == 0:
        raise _refused(prefix, f"must have at least {length} tokens, not {index.tokens}")
    everything = np.memmap(with_suffix(prefix, ".bin"), index.dtype, "r", shape=(available, length))
    wanted = max(1, tokens // length)
    chosen = torch.randperm(available, generator=torch.Generator().manual_seed(_SEED))[:wanted].sort().values
    found = torch.from_numpy(everything[chosen.numpy()].astype(np.int64))
    if (largest := int(found.max())) >= vocab_size:
        raise _refused(prefix, f"has token id {largest}, and the model knows those below {vocab_size}")
    return found


def _refused(prefix: Path, valid: str) -> ConfigError:
    return ConfigError(Problem("--calibration", str(prefix), valid))
