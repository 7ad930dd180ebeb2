"""The product of every expert's tokens with its matrix, on CUDA and on hosts without."""

from __future__ import annotations

import torch

# What a number of tokens is filled up to on a CPU with 16 bits.
BLOCK = 64
_ALIGNMENT = 16  # bytes


def grouped_product(rows: torch.Tensor, matrices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """rows [n, in], sorted by expert, times matrices [experts, in, out] gives [n, out], of one dtype.

    offsets [experts] int32 are the ends of each expert's rows. Source: `torch.nn.functional.grouped_mm`.
    """
    if needs_few_shapes(rows):
        return _by_blocks(rows, matrices, offsets)
    return torch.nn.functional.grouped_mm(rows, aligned(matrices) if matrices.is_cuda else matrices, offs=offsets)


def aligned(matrices: torch.Tensor) -> torch.Tensor:
    """The same, where CUDA's kernels take it from: a copy of what ZeRO 3 keeps at an odd place of a flat tensor."""
    return matrices.clone() if matrices.data_ptr() % _ALIGNMENT else matrices


def needs_few_shapes(tensor: torch.Tensor) -> bool:
    """Whether products with it cost a kernel's compilation per shape, as oneDNN's do, which a CPU has for 16 bits.

    Routers give an expert another number of tokens every time, and to compile takes longer than to multiply.
    """
    return not tensor.is_cuda and tensor.dtype in (torch.bfloat16, torch.float16)


def _by_blocks(rows: torch.Tensor, matrices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    output = rows.new_empty(len(rows), matrices.shape[2])
    start = 0
    for end, matrix in zip(offsets.tolist(), matrices, strict=True):
        size = -(-(end - start) // BLOCK) * BLOCK
        if start + size > len(rows) and end >= size:
            # Too near the end to run over: the rows before are multiplied, too, and what comes of them is left.
            output[start:end] = torch.mm(rows[end - size : end], matrix)[size - (end - start) :]
        else:
            # What this writes behind the expert's rows, the next experts overwrite.
            torch.mm(rows[start : start + size], matrix, out=output[start : start + size])
        start = end
    return output
