"""What tells that two tensors hold the same bits."""

from __future__ import annotations

import pytest
import torch

from megatron_tied.engine import consistency
from megatron_tied.engine.consistency import checksum


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.bool])
def test_parts_add_up_to_the_whole_and_any_bit_counts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    bits = torch.randint(0, 2, (23 * dtype.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = checksum(bits.view(dtype))
    monkeypatch.setattr(consistency, "_AT_ONCE", 3)
    assert torch.equal(checksum(bits.view(dtype)), whole)
    for place in range(len(bits)):
        flipped = bits.clone()
        flipped[place] ^= 1
        assert not torch.equal(checksum(flipped.view(dtype)), whole)
    assert not torch.equal(checksum(bits.flip(0).view(dtype)), whole)
