"""The matrices that Muon makes orthogonal, as blocks of the parameters that hold them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

# Two dimensions, but not a map from one hidden state to another: AdamW's, as the paper has it.
_NOT_HIDDEN = re.compile(r"(^|\.)(embedding|output_layer|router)\.|\.gate_weight$")
_QKV = re.compile(r"self_attention\.linear_qkv\.weight$")


@dataclass(frozen=True)
class Block:
    """A run of elements of one flattened parameter that holds whole matrices.

    start: its first element. rows, columns: of all of it. groups, heights: its rows are so many groups, and in each of
    them so many rows of the first matrix, the second, and so on.
    """

    parameter: str
    start: int
    rows: int
    columns: int
    groups: int
    heights: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Its elements."""
        return self.rows * self.columns

    def split(self, block: torch.Tensor) -> list[torch.Tensor]:
        """The matrices of `block` [rows, columns]."""
        parts = torch.split(block.view(self.groups, -1, self.columns), list(self.heights), dim=1)
        return [part.flatten(0, 1) for part in parts]

    def join(self, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
        """The block [rows, columns] that has these matrices."""
        parts = [matrix.reshape(self.groups, -1, self.columns) for matrix in matrices]
        return torch.cat(parts, dim=1).flatten(0, 1)


def is_hidden_matrix(name: str, parameter: torch.nn.Parameter) -> bool:
    """Whether a parameter holds matrices between hidden states, or one for each of several experts."""
    dim = len(getattr(parameter, "ds_shape", parameter.shape))
    return dim > 1 and not _NOT_HIDDEN.search(name)


def blocks_of(name: str, shape: torch.Size, config: TransformerConfig) -> Iterator[Block]:
    """The blocks of a parameter that `is_hidden_matrix`: one for each expert; query, key and value are matrices."""
    *experts, rows, columns = shape
    groups = 1
    heights: tuple[int, ...] = (rows,)
    if _QKV.search(name):
        # Megatron-Core has them by query group.
        groups, width = config.num_query_groups, config.kv_channels
        heights = (config.num_attention_heads // groups * width, width, width)
    for index in range(math.prod(experts)):
        yield Block(name, index * rows * columns, rows, columns, groups, heights)
