"""This rank's part of a state dict, as torch.distributed.checkpoint takes it: rectangles of whole tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megatron_tied.checkpoint.layout import Layout
from megatron_tied.engine.partitions import Fragment


class Rectangles:
    """Rectangles of one whole tensor, each a view of what this rank holds.

    The double-underscore methods are those by which torch.distributed.checkpoint plans for objects that are no tensors
    (`torch.distributed._checkpointable`).
    """

    def __init__(self, shape: Iterable[int]):
        self._shape = torch.Size(shape)
        self._pieces: dict[torch.Size, torch.Tensor] = {}

    def add(self, offsets: Iterable[int], piece: torch.Tensor) -> None:
        """Take `piece` as the rectangle that begins at `offsets`."""
        self._pieces[torch.Size(offsets)] = piece

    def size(self) -> torch.Size:
        """The shape of the whole tensor."""
        return self._shape

    def copied_to_host(self) -> Rectangles:
        """The same rectangles with values of their own, in host memory."""
        copy = Rectangles(self._shape)
        for offsets, piece in self._pieces.items():
            copy.add(offsets, piece.to("cpu", copy=True))
        return copy

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets, piece.shape),
                    properties=TensorProperties(dtype=piece.dtype),
                    size=self._shape,
                ),
            )
            for offsets, piece in self._pieces.items()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets, piece.shape) for offsets, piece in self._pieces.items()]

    def piece(self, offsets: torch.Size) -> torch.Tensor:
        """The rectangle that begins at `offsets`."""
        return self._pieces[offsets]


StateDict = dict[str, Rectangles | torch.Tensor]


class RectanglesSavePlanner(DefaultSavePlanner):
    """torch's planner, for state dicts with `Rectangles` in them."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The tensor to be written."""
        return _lookup(self.state_dict, index)


class RectanglesLoadPlanner(DefaultLoadPlanner):
    """torch's planner, for state dicts with `Rectangles` in them."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: StateDict, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Upstream's first replaces tensors on the meta device, and with them drops what is no tensor."""
        self.original_state_dict = self.state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """The tensor to be read into."""
        return _lookup(self.state_dict, index)


def _lookup(tensors: StateDict, index: MetadataIndex) -> torch.Tensor:
    value = tensors[index.fqn]
    return value.piece(index.offset) if isinstance(value, Rectangles) else value


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
