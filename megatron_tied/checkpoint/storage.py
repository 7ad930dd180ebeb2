"""How torch.distributed.checkpoint stores our checkpoints: safetensors files, one a rank, and a JSON manifest.

Its own storage pickles. This one never executes what it reads.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_tied.checkpoint.manifest import Chunk, File, Manifest, Tensor, sha256
from megatron_tied.files import sync


class SafetensorsWriter(StorageWriter):
    """Writes each rank's rectangles into the directory `staging`, and the manifest when all ranks have written.

    On the coordinating rank `begin` is called first, and `commit` last, when the checkpoint may be given its name.
    `expected` are the tensors it must have.
    """

    def __init__(
        self,
        staging: Path,
        manifest: Manifest,
        expected: Set[str],
        begin: Callable[[], None],
        commit: Callable[[], None],
    ):
        self._staging = staging
        self._manifest = manifest
        self._expected = expected
        self._begin = begin
        self._commit = commit

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept from one save to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Make the staging directory, before any rank is given its plan."""
        if is_coordinator:
            self._begin()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Each rank gets the name of its file."""
        return [
            dataclasses.replace(plan, storage_data=f"rank_{rank:05d}.safetensors") for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file, flush it to its device, read it again and compare."""
        name = plan.storage_data
        path = self._staging / name
        tensors = {_key(item.index): planner.resolve_data(item).detach().cpu().contiguous() for item in plan.items}
        written: Future[list[WriteResult]] = Future()
        if tensors:
            save_file(tensors, path)
            sync(path)
            file = File(path.stat().st_size, sha256(path))
            _compare(path, tensors)
            written.set_result([WriteResult(item.index, file.bytes, (name, file)) for item in plan.items])
        else:
            written.set_result([])
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the manifest and commit; only the coordinator is asked."""
        if missing := sorted(self._expected - metadata.state_dict_metadata.keys()):
            raise ValueError(f"no rank has written {', '.join(missing)}")
        stored = {result.index: result.storage_data for of_rank in results for result in of_rank}
        tensors = {
            name: Tensor(
                dtype=str(entry.properties.dtype).removeprefix("torch."),
                shape=list(entry.size),
                chunks=[
                    Chunk(stored[MetadataIndex(name, chunk.offsets)][0], list(chunk.offsets), list(chunk.sizes))
                    for chunk in entry.chunks
                ],
            )
            for name, entry in metadata.state_dict_metadata.items()
        }
        files = dict(sorted(stored.values(), key=lambda entry: entry[0]))
        manifest = dataclasses.replace(self._manifest, tensors=tensors, files=files)
        sync(manifest.write(self._staging))
        sync(self._staging)
        self._commit()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Directories only."""
        return isinstance(checkpoint_id, (str, Path))


def _compare(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with safe_open(path, framework="pt") as file:
        for name, tensor in tensors.items():
            # Bytes, for a NaN is not equal to itself.
            found, written = (value.flatten().view(torch.uint8) for value in (file.get_tensor(name), tensor))
            if not torch.equal(found, written):
                raise OSError(f"{path} does not hold what was written to it: {name}")


class SafetensorsReader(StorageReader):
    """Reads rectangles of the checkpoint in `directory`; of its files no more than they need."""

    def __init__(self, directory: Path, manifest: Manifest):
        self._directory = directory
        self._manifest = manifest
        self._file_of: dict[MetadataIndex, str] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept from one load to the next."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The manifest's tensors."""
        entries = {}
        for name, tensor in self._manifest.tensors.items():
            chunks = []
            for chunk in tensor.chunks:
                offsets = torch.Size(chunk.offsets)
                self._file_of[MetadataIndex(name, offsets)] = chunk.file
                chunks.append(ChunkStorageMetadata(offsets, torch.Size(chunk.sizes)))
            properties = TensorProperties(dtype=getattr(torch, tensor.dtype))
            entries[name] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
        return Metadata(state_dict_metadata=entries)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: `read_metadata` was called on every rank."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy every rectangle of the plan into its place."""
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            by_file[self._file_of[item.storage_index]].append(item)
        for name, items in by_file.items():
            with safe_open(self._directory / name, framework="pt") as file:
                for item in items:
                    ranges = zip(item.storage_offsets, item.lengths, strict=True)
                    part = file.get_slice(_key(item.storage_index))[tuple(slice(o, o + n) for o, n in ranges)]
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(part)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Directories only."""
        return isinstance(checkpoint_id, (str, Path))


def tensor_key(name: str, offsets: Iterable[int]) -> str:
    """The name of a rectangle in its file, such as `weight/output_layer.weight@128,0`."""
    return f"{name}@{','.join(map(str, offsets))}"


def _key(index: MetadataIndex) -> str:
    return tensor_key(index.fqn, index.offset or ())
