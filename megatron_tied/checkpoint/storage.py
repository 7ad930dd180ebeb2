"""The files of a checkpoint: safetensors, one a rank, and how a manifest tells of them. Nothing read is executed."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_tied.checkpoint.manifest import BrokenCheckpointError, Chunk, File, Manifest, Tensor, sha256
from megatron_tied.checkpoint.rectangles import Rectangles, StateDict
from megatron_tied.files import sync

Slices = tuple[slice, ...]
# A file's bytes and SHA-256; of each rectangle in it: tensor, dtype, the tensor's shape, where it begins, its sizes.
Written = tuple[int, str, list[tuple[str, str, list[int], list[int], list[int]]]]


def write(directory: Path, rank: int, tensors: StateDict) -> Written | None:
    """Write the file of `rank`, flush it to its device, read it again and compare.

    Returns what `completed` needs to know of it; None where there is nothing to write. Raises `OSError` if it does not
    hold what was written.
    """
    content: dict[str, torch.Tensor] = {}
    chunks = []
    for name, value in tensors.items():
        whole = Rectangles.of(value)
        for offsets, piece in whole.pieces.items():
            content[tensor_key(name, offsets)] = piece.detach().cpu().contiguous()
            dtype = str(piece.dtype).removeprefix("torch.")
            chunks.append((name, dtype, list(whole.shape), list(offsets), list(piece.shape)))
    if not content:
        return None
    path = directory / _file_name(rank)
    save_file(content, path)
    sync(path)
    size, checksum = path.stat().st_size, sha256(path)
    _compare(path, content)
    return size, checksum, chunks


def completed(manifest: Manifest, written: Sequence[Written | None], expected: Set[str]) -> Manifest:
    """`manifest` with the files and tensors that `write` has told of, rank by rank.

    Raises `ValueError` if one of the `expected` tensors is missing, if any has elements that are not there or there
    twice, and if ranks differ about its dtype or shape.
    """
    files: dict[str, File] = {}
    tensors: dict[str, Tensor] = {}
    for rank, told in enumerate(written):
        if told is None:
            continue
        size, checksum, chunks = told
        files[_file_name(rank)] = File(size, checksum)
        for name, dtype, shape, offsets, sizes in chunks:
            tensor = tensors.setdefault(name, Tensor(dtype, shape, []))
            if (tensor.dtype, tensor.shape) != (dtype, shape):
                raise ValueError(f"{name} is {tensor.dtype} {tensor.shape} and, on rank {rank}, {dtype} {shape}")
            tensor.chunks.append(Chunk(_file_name(rank), offsets, sizes))
    if missing := sorted(expected - tensors.keys()):
        raise ValueError(f"no rank has written {', '.join(missing)}")
    if wrong := sorted(name for name, tensor in tensors.items() if not tensor.is_covered_once()):
        raise ValueError(f"the ranks have not written every element once of {', '.join(wrong)}")
    return dataclasses.replace(manifest, tensors=tensors, files=files)


def read(directory: Path, manifest: Manifest, tensors: StateDict) -> None:
    """Fill `tensors`, by name, from the checkpoint in `directory`; of its files no more is read than that takes.

    Raises `BrokenCheckpointError` for a tensor that is not wholly there, or not in this shape, and for a file that
    cannot be read.
    """
    parts: dict[str, list[tuple[str, Slices, torch.Tensor]]] = defaultdict(list)
    for name, value in tensors.items():
        wanted, stored = Rectangles.of(value), manifest.tensors.get(name)
        if stored is None or not stored.is_covered_once():
            raise BrokenCheckpointError(directory, f"does not hold all of {name}")
        if stored.shape != list(wanted.shape):
            raise BrokenCheckpointError(directory, f"holds {name} as {stored.shape}, not as {list(wanted.shape)}")
        for chunk, source, target in _overlaps(wanted, stored.chunks):
            parts[chunk.file].append((tensor_key(name, chunk.offsets), source, target))
    for file_name, of_file in parts.items():
        try:
            with safe_open(directory / file_name, framework="pt") as file:
                for key, source, target in of_file:
                    target.copy_(file.get_slice(key)[source])
        except (OSError, SafetensorError) as error:
            raise BrokenCheckpointError(directory / file_name, f"cannot be read: {error}") from error


def tensor_key(name: str, offsets: Iterable[int]) -> str:
    """The name of a rectangle in its file, such as `weight/output_layer.weight@128,0`."""
    return f"{name}@{','.join(map(str, offsets))}"


def _file_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _compare(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with safe_open(path, framework="pt") as file:
        for name, tensor in tensors.items():
            # Bytes, for a NaN is not equal to itself.
            found, written = (value.flatten().view(torch.uint8) for value in (file.get_tensor(name), tensor))
            if not torch.equal(found, written):
                raise OSError(f"{path} does not hold what was written to it: {name}")


def _overlaps(wanted: Rectangles, chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, Slices, torch.Tensor]]:
    """What the rectangles have in common with `chunks`: the chunk, where in it that is, and a view to be filled."""
    # Said, for NumPy cannot see it where the tensor has no dimensions.
    shape = len(chunks), len(wanted.shape)
    begins = np.array([chunk.offsets for chunk in chunks], dtype=np.int64).reshape(shape)
    ends = begins + np.array([chunk.sizes for chunk in chunks], dtype=np.int64).reshape(shape)
    for offsets, piece in wanted.pieces.items():
        # All chunks at once: one after the other, a thousand rectangles of a thousand chunks would take seconds.
        low, high = np.maximum(begins, offsets), np.minimum(ends, np.add(offsets, piece.shape))
        for index in np.flatnonzero((low < high).all(axis=1)).tolist():
            in_chunk, in_piece = (
                tuple(map(slice, (low[index] - origin).tolist(), (high[index] - origin).tolist()))
                for origin in (begins[index], offsets)
            )
            yield chunks[index], in_chunk, piece.detach()[in_piece]
