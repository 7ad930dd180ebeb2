"""In which precision the tensors of a conversion are written."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in PRECISIONS.items()}


def written_dtype(stored: torch.dtype, wanted: torch.dtype | None, state: str) -> torch.dtype:
    """The dtype of a tensor that is stored as `stored`; `wanted` None keeps it.

    Buffers keep theirs whatever is wanted: a router's expert bias in bf16 would choose other experts.
    """
    return stored if wanted is None or state == "buffer" else wanted


def common_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The narrowest in which none of `dtypes` is rounded."""
    return reduce(torch.promote_types, dtypes)
