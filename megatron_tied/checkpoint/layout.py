"""Where the elements of this rank's parameters stand in the model's whole tensors.

A checkpoint knows whole tensors only: a bank once, under its owner, as `...mlp.experts.gate`, `.up` and `.down` of
[experts, rows, columns] with experts by their global index, and every other parameter under the name that `names.py`
gives it and in its whole shape. So neither expert parallelism, tensor parallelism, the expert backend nor Transformer
Engine can be read off its names.
"""

# ruff: noqa: E402  (Megatron-Core must be imported after the host is prepared)
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_tied.platform import prepare

prepare()

from megatron.core import parallel_state

from megatron_tied.checkpoint.names import checkpoint_name
from megatron_tied.engine.groups import is_expert_parallel, mark_expert_parameters
from megatron_tied.layers.backends import expert_matrices
from megatron_tied.layers.moe_layer import TiedMoELayer, tied_layers
from megatron_tied.layers.tensor_parallel import is_tensor_parallel, whole_shape

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """A rectangle of the whole tensor `tensor` of `shape` that lies, row by row, in one parameter of this rank.

    `offsets` and `sizes` say where and how large it is, `start` at which element of the flattened parameter it begins.
    """

    tensor: str
    shape: Shape
    offsets: Shape
    sizes: Shape
    start: int

    def rectangles(self, start: int, stop: int) -> Iterator[tuple[Shape, Shape, int]]:
        """The part of this block in elements [start, stop) of its parameter, as rectangles of the whole tensor.

        Each is (offsets, sizes, first element in the parameter); 2 x dimensions - 1 of them at most.
        """
        first, last = max(start - self.start, 0), min(stop - self.start, math.prod(self.sizes))
        for offsets, sizes, begin in _rectangles(self.sizes, first, last):
            yield tuple(map(sum, zip(self.offsets, offsets, strict=True))), sizes, self.start + begin


@dataclass(frozen=True)
class LocalParameter:
    """The blocks of one parameter, and whether some other rank holds the same elements and comes first."""

    blocks: tuple[Block, ...]
    is_first_copy: bool


Layout = dict[str, LocalParameter]


def model_layout(model: torch.nn.Module, *, zero_stage: int = 0) -> Layout:
    """The layout of every parameter of `model`, by name.

    `zero_stage` is that of the training to come; none is 0. To be called before ZeRO 3 takes the parameters apart, and
    after those to be frozen are. Raises `TypeError` for expert parameters that no backend tells about.
    """
    # With tensor parallelism Megatron-Core's own mark is not yet what it has to be.
    mark_expert_parameters(model)
    experts = {id(weight): layer for layer in tied_layers(model) for weight in layer.experts.parameters()}
    layout: Layout = {}
    for index, (name, parameter) in enumerate(model.named_parameters()):
        layer = experts.get(id(parameter))
        found = _dense_blocks(name, parameter) if layer is None else _expert_blocks(name, parameter, layer)
        blocks = tuple(found)
        if sum(math.prod(block.sizes) for block in blocks) != parameter.numel():
            raise TypeError(f"{name}: a checkpoint cannot hold this expert parameter")
        # Up to stage 2 ZeRO cuts what its optimizer updates.
        partitioned = zero_stage == 3 or (zero_stage > 0 and parameter.requires_grad)
        layout[name] = LocalParameter(blocks, _is_first_copy(index, parameter, partitioned))
    return layout


def _is_first_copy(index: int, parameter: torch.nn.Parameter, partitioned: bool) -> bool:
    is_expert = is_expert_parallel(parameter)
    whole_everywhere = not is_expert and not is_tensor_parallel(parameter)
    if whole_everywhere and parallel_state.get_tensor_model_parallel_rank() != 0:
        return False
    if partitioned:
        return True
    group: torch.distributed.ProcessGroup = (
        parallel_state.get_expert_data_parallel_group() if is_expert else parallel_state.get_data_parallel_group()
    )
    # In turn, so that all of them write.
    return index % group.size() == group.rank()


def _dense_blocks(parameter_name: str, parameter: torch.nn.Parameter) -> Iterator[Block]:
    name = checkpoint_name(parameter_name)
    shape, sizes = tuple(whole_shape(parameter)), list(parameter.shape)
    if not is_tensor_parallel(parameter):
        yield Block(name, shape, (0,) * len(shape), shape, 0)
        return
    # Several pieces only where gate and up rows are each cut: along the first dimension, so each piece is a run.
    marks = vars(parameter)
    dim, pieces = marks["partition_dim"], marks["partition_stride"]
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    sizes[dim] //= pieces
    for piece in range(pieces):
        offsets = [0] * len(shape)
        offsets[dim] = (piece * ranks + rank) * sizes[dim]
        yield Block(name, shape, tuple(offsets), tuple(sizes), piece * math.prod(sizes))


def _expert_blocks(name: str, parameter: torch.nn.Parameter, layer: TiedMoELayer) -> Iterator[Block]:
    bank, _, _ = name.partition(".experts.")
    storage = parameter.untyped_storage().data_ptr()
    for index, matrices in zip(layer.local_expert_indices, expert_matrices(layer.experts), strict=True):
        for kind, matrix in matrices.items():
            if matrix.untyped_storage().data_ptr() == storage:
                yield Block(
                    tensor=f"{bank}.experts.{kind}",
                    shape=(layer.config.num_moe_experts, *matrix.shape),
                    offsets=(index, 0, 0),
                    sizes=(1, *matrix.shape),
                    start=int(matrix.storage_offset() - parameter.storage_offset()),
                )


def _rectangles(sizes: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape, int]]:
    """Elements [start, stop) of an array of `sizes`, row by row, as (offsets, sizes, first element)."""
    if start >= stop:
        return
    if len(sizes) == 1:
        yield (start,), (stop - start,), start
        return
    row = math.prod(sizes[1:])
    first_whole, after_whole = -(-start // row), stop // row
    if start % row:
        yield from _part_of_row(sizes, start, min(stop, first_whole * row))
    if first_whole < after_whole:
        yield (
            (first_whole, *(0 for _ in sizes[1:])),
            (after_whole - first_whole, *sizes[1:]),
            first_whole * row,
        )
    if after_whole >= first_whole and stop % row:
        yield from _part_of_row(sizes, after_whole * row, stop)


def _part_of_row(sizes: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape, int]]:
    row = math.prod(sizes[1:])
    index = start // row
    for offsets, inner, begin in _rectangles(sizes[1:], start - index * row, stop - index * row):
        yield (index, *offsets), (1, *inner), index * row + begin
