"""What a conversion writes, tensor by tensor: one list has the sizes, before anything is read, and the tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from megatron_tied.convert.precision import written_dtype
from megatron_tied.convert.sources import WeightSource
from megatron_tied.convert.tensors import Entry, Shape, count, expert_shape


@dataclass(frozen=True)
class Piece:
    """Tensors that are written together, since they are read together, as `dtype`.

    `state` is the prefix of their names in our checkpoint.
    """

    names: Sequence[str]
    shapes: Sequence[Shape]
    dtype: torch.dtype
    read: Callable[[], Iterable[torch.Tensor]]
    state: str = "weight"

    @property
    def bytes(self) -> int:
        """Of all its tensors."""
        return sum(map(count, self.shapes)) * self.dtype.itemsize


@dataclass
class Written:
    """The tensors of pieces in turn; `advance` is told of each one's bytes, and `not_finite` then has names."""

    pieces: Iterable[Piece]
    advance: Callable[[int], object] = lambda size: None
    not_finite: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor, str]]:
        for piece in self.pieces:
            for name, stored in zip(piece.names, piece.read(), strict=True):
                tensor = stored.to(piece.dtype)
                # Its ends rather than `isfinite`, which would take a copy.
                if not all(math.isfinite(end) for end in tensor.aminmax()):
                    self.not_finite.append(name)
                yield name, tensor, piece.state
                self.advance(tensor.numel() * tensor.element_size())
                del stored, tensor


def total_bytes(pieces: Iterable[Piece]) -> int:
    """Of all their tensors."""
    return sum(piece.bytes for piece in pieces)


def experts_piece(source: WeightSource, name: str, layer: int, kind: str, wanted: torch.dtype | None) -> Piece:
    """One kind of the matrices of all experts that `layer` uses, stacked in a tensor called `name`."""
    shape = expert_shape(source.config, source.topology, layer, kind)
    dtype = written_dtype(source.expert_dtype(layer, kind), wanted, "weight")
    return Piece((name,), (shape,), dtype, lambda: [source.read_experts(layer, kind)])


def entry_piece(source: WeightSource, entry: Entry, wanted: torch.dtype | None, *, ours: bool) -> Piece:
    """The tensor of `entry` as our checkpoints have it, or as Hugging Face's do."""
    dtype = written_dtype(source.dtype(entry.ours), wanted, entry.state)
    if ours:
        return Piece((entry.ours,), (entry.shape,), dtype, lambda: [source.read(entry.ours)], entry.state)
    return Piece(entry.theirs, entry.shapes, dtype, lambda: entry.split(source.read(entry.ours)), entry.state)
