"""Finding a sound checkpoint, and loading what this rank needs of it; all ranks agree or all stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_tied import exchange
from megatron_tied.checkpoint.directory import CheckpointDirectory
from megatron_tied.checkpoint.layout import model_layout
from megatron_tied.checkpoint.manifest import BrokenCheckpointError, Manifest
from megatron_tied.checkpoint.rectangles import StateDict, state_dict
from megatron_tied.checkpoint.storage import read
from megatron_tied.checkpoint.together import of_every_rank
from megatron_tied.engine.partitions import WEIGHT, Fragment
from megatron_tied.exchange import AnyJson, gather_json

_UNUSABLE = (BrokenCheckpointError, OSError)


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
    passed_over: list[BrokenCheckpointError] = []
    try:
        on_rank_0(lambda: directory.latest() is not None)  # of interest only if it raises
    except BrokenCheckpointError as error:
        passed_over.append(error)
    try:
        steps = on_rank_0(directory.steps)
    except BrokenCheckpointError as error:
        return Found(None, [*passed_over, error])
    for step in steps:
        try:
            return Found(verified(directory.path(step)), passed_over)
        except BrokenCheckpointError as error:
            passed_over.append(error)
    return Found(None, passed_over)


def verified(path: Path) -> Checkpoint:
    """Read the whole checkpoint, each rank its share; a collective. Raises `BrokenCheckpointError` on every rank."""
    failure = None
    try:
        manifest = _share_verified(path)
    except _UNUSABLE as error:
        failure = str(error)
    for told in gather_json(failure):
        if told is not None:
            raise BrokenCheckpointError(told)
    return Checkpoint(path, manifest)


def _share_verified(path: Path) -> Manifest:
    manifest = Manifest.read(path)
    manifest.check_presence(path)
    for name in sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()]:
        manifest.check_file(path, name)
    return manifest


def load(tensors: StateDict, checkpoint: Checkpoint) -> None:
    """Fill `tensors`, by name, from the checkpoint; a collective. Reads no more of the files than that takes.

    Raises `RankError` on every rank if one of them cannot.
    """
    of_every_rank(lambda: read(checkpoint.path, checkpoint.manifest, tensors))


def load_weights(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Fill the parameters and buffers of a model without an engine, in their own dtype; a collective.

    Each rank reads its own experts and parts straight into their places. Optimizer states are not read.
    """
    parameters = dict(model.named_parameters())
    whole = [Fragment(name, 0, {WEIGHT: value.detach().view(-1)}) for name, value in parameters.items()]
    load({**state_dict(whole, model_layout(model), saving=False), **saved_buffers(model)}, checkpoint)


def saved_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that PyTorch would save, such as the routers' expert biases, by their names in a checkpoint."""
    names = model.state_dict().keys()
    return {f"buffer/{name}": value for name, value in model.named_buffers() if name in names}


def on_rank_0(action: Callable[[], AnyJson]) -> AnyJson:
    """What `action` finds on the first rank, for all; a collective.

    Raises `BrokenCheckpointError` on every rank if it does there, or if something cannot be read.
    """
    return exchange.on_rank_0(action, _UNUSABLE, BrokenCheckpointError)
