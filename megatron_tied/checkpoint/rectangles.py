"""This rank's part of a state dict: rectangles of whole tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from megatron_tied.checkpoint.layout import Layout, Shape
from megatron_tied.engine.partitions import Fragment


class Rectangles:
    """Rectangles of one whole tensor of `shape`: `pieces` are views of what this rank holds, by where they begin."""

    def __init__(self, shape: Iterable[int]):
        self.shape: Shape = tuple(shape)
        self.pieces: dict[Shape, torch.Tensor] = {}

    @classmethod
    def of(cls, value: Rectangles | torch.Tensor) -> Rectangles:
        """`value`, or the one rectangle that a whole tensor is."""
        if isinstance(value, Rectangles):
            return value
        whole = cls(value.shape)
        whole.add((0,) * value.dim(), value)
        return whole

    def add(self, offsets: Iterable[int], piece: torch.Tensor) -> None:
        """Take `piece` as the rectangle that begins at `offsets`."""
        self.pieces[tuple(offsets)] = piece

    def copied_to_host(self) -> Rectangles:
        """The same rectangles with values of their own, in host memory."""
        copy = Rectangles(self.shape)
        for offsets, piece in self.pieces.items():
            copy.add(offsets, piece.to("cpu", copy=True))
        return copy


# A tensor is whole, and may be on several ranks; a rectangle that is saved is on one only.
StateDict = dict[str, Rectangles | torch.Tensor]


def state_dict(fragments: Iterable[Fragment], layout: Layout, *, saving: bool) -> dict[str, Rectangles]:
    """What `fragments` hold, by `state/tensor`; for saving, without what another rank saves too."""
    found: dict[str, Rectangles] = {}
    for fragment in fragments:
        parameter = layout[fragment.parameter]
        if saving and not parameter.is_first_copy:
            continue
        for state, values in fragment.tensors.items():
            stop = fragment.start + len(values)
            for block in parameter.blocks:
                for offsets, sizes, begin in block.rectangles(fragment.start, stop):
                    whole = found.setdefault(f"{state}/{block.tensor}", Rectangles(block.shape))
                    piece = values.narrow(0, begin - fragment.start, math.prod(sizes))
                    whole.add(offsets, piece.view(sizes))
    return found
