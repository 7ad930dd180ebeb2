"""The marks that Megatron-Core sets on a Parameter to say how ranks hold it: attributes that torch's class lacks."""

from __future__ import annotations

from typing import TypedDict, Unpack, cast

import torch


class Marks(TypedDict, total=False):
    """Megatron-Core's names; what it has not set is missing."""

    allreduce: bool  # False: the gradient is reduced over expert-DP in place of DP; DeepSpeed reads it, too
    sequence_parallel: bool  # the gradient of a tensor parallel rank is one part of a sum
    tensor_model_parallel: bool  # each tensor parallel rank holds another part, and these two say which:
    partition_dim: int  # where it is cut
    partition_stride: int  # in how many pieces a rank


def mark(parameter: torch.nn.Parameter, **marks: Unpack[Marks]) -> None:
    """Set these marks of `parameter`, and leave the others."""
    vars(parameter).update(marks)


def marks_of(tensor: torch.Tensor) -> Marks:
    """The marks that `tensor` has."""
    return cast(Marks, vars(tensor))
