"""Products of experts' tokens with their matrices against a loop over experts."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_tied.layers.grouped_product import BLOCK, aligned, grouped_product

# Around the blocks that tokens are filled up to, at the ends and in the middle.
COUNTS = [
    [0, 0, 0],
    [3, 0, 1],
    [BLOCK, 0, BLOCK],
    [BLOCK - 1, BLOCK + 1, 0],
    [1, 2 * BLOCK, 5],
    [BLOCK + 3, 0, 7],
    [5, 6, BLOCK + 1],
]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_token_meets_its_experts_matrix(counts: list[int], dtype: torch.dtype, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(counts), 16, generator=generator).to(dtype)
    matrices = torch.randn(len(counts), 24, 16, generator=generator).to(dtype).transpose(1, 2)
    if not transposed:
        matrices = matrices.contiguous()
    ends = list(itertools.accumulate(counts))
    expected = torch.cat(
        [part.double() @ matrix.double() for part, matrix in zip(rows.split(counts), matrices, strict=True)]
    )
    found = grouped_product(rows, matrices, torch.tensor(ends, dtype=torch.int32))
    assert found.dtype == dtype
    rtol = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=4 * rtol)


def test_what_lies_at_an_odd_place_is_copied_to_an_even_one() -> None:
    flat = torch.arange(2 * 3 * 8 + 1, dtype=torch.float32)
    odd, even = (flat[start:][: 2 * 3 * 8].view(2, 3, 8).transpose(1, 2) for start in (1, 0))
    copy = aligned(odd)
    assert copy.data_ptr() % 16 == 0
    assert copy.stride() == odd.stride()  # which kernels choose by
    torch.testing.assert_close(copy, odd, rtol=0, atol=0)
    assert aligned(even).data_ptr() == even.data_ptr()
