"""Finding a sound checkpoint, and loading what this rank needs of it; all ranks agree or all stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import load as load_state_dict

from megatron_tied.checkpoint.directory import LATEST, CheckpointDirectory
from megatron_tied.checkpoint.layout import model_layout
from megatron_tied.checkpoint.manifest import BrokenCheckpointError, Manifest
from megatron_tied.checkpoint.rectangles import RectanglesLoadPlanner, StateDict, state_dict
from megatron_tied.checkpoint.storage import SafetensorsReader
from megatron_tied.engine.partitions import WEIGHT, Fragment

_T = TypeVar("_T")


class Checkpoint(NamedTuple):
    """A checkpoint whose every byte has been compared with its checksums."""

    path: Path
    manifest: Manifest


class Found(NamedTuple):
    """The newest sound checkpoint of a directory, if any, and what was passed over because it is not sound."""

    checkpoint: Checkpoint | None
    passed_over: list[BrokenCheckpointError]


def newest_sound(directory: CheckpointDirectory) -> Found:
    """Search `directory` from its newest checkpoint on; a collective."""
    passed_over = []
    try:
        latest = on_rank_0(directory.latest)
        if latest is not None and not on_rank_0(latest.is_dir):
            raise BrokenCheckpointError(directory.root / LATEST, f"names {latest.name}, which is not there")
    except BrokenCheckpointError as error:
        passed_over.append(error)
    for step in on_rank_0(directory.steps):
        try:
            return Found(verified(directory.path(step)), passed_over)
        except BrokenCheckpointError as error:
            passed_over.append(error)
    return Found(None, passed_over)


def verified(path: Path) -> Checkpoint:
    """Read the whole checkpoint, each rank its share; a collective. Raises `BrokenCheckpointError` on every rank."""

    def check() -> Manifest:
        manifest = Manifest.read(path)
        manifest.check_presence(path)
        for name in sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()]:
            manifest.check_file(path, name)
        return manifest

    return Checkpoint(path, _all_or_none(check))


def load(tensors: StateDict, checkpoint: Checkpoint) -> None:
    """Fill `tensors`, by name, from the checkpoint; a collective. Reads no more of the files than that takes."""
    reader = SafetensorsReader(checkpoint.path, checkpoint.manifest)
    load_state_dict(tensors, storage_reader=reader, planner=RectanglesLoadPlanner())


def load_weights(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Fill the parameters and buffers of a model without an engine, in their own dtype; a collective.

    Each rank reads its own experts and parts straight into their places. Optimizer states are not read.
    """
    parameters = dict(model.named_parameters())
    whole = [Fragment(name, 0, {WEIGHT: value.detach().view(-1)}) for name, value in parameters.items()]
    tensors: StateDict = state_dict(whole, model_layout(model, partitioned=False), saving=False)
    load(tensors | saved_buffers(model), checkpoint)


def saved_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that PyTorch would save, such as the routers' expert biases, by their names in a checkpoint."""
    names = model.state_dict().keys()
    return {f"buffer/{name}": value for name, value in model.named_buffers() if name in names}


def on_rank_0(action: Callable[[], _T]) -> _T:
    """What `action` finds on the first rank, for all: ranks may see a shared file system a moment apart; a collective.

    Raises `BrokenCheckpointError` on every rank if it does there, or if something cannot be read.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except (BrokenCheckpointError, OSError) as error:
            outcome[1] = _told(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise BrokenCheckpointError(*outcome[1])
    return outcome[0]


def _all_or_none(action: Callable[[], _T]) -> _T:
    """The result of `action` on this rank; if it fails on any, the first failure on all."""
    result, failure = None, None
    try:
        result = action()
    except (BrokenCheckpointError, OSError) as error:
        failure = _told(error)
    failures: list[tuple[Path, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    for found in failures:
        if found is not None:
            raise BrokenCheckpointError(*found)
    return result


def _told(error: BrokenCheckpointError | OSError) -> tuple[Path, str]:
    if isinstance(error, BrokenCheckpointError):
        return error.path, error.cause
    return Path(error.filename or "."), f"cannot be read: {error.strerror}"
