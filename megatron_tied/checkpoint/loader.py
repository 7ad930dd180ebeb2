"""Finding a sound checkpoint, and loading what this rank needs of it; all ranks agree or all stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from megatron_tied.checkpoint.directory import LATEST, CheckpointDirectory
from megatron_tied.checkpoint.layout import model_layout
from megatron_tied.checkpoint.manifest import BrokenCheckpointError, Manifest
from megatron_tied.checkpoint.rectangles import StateDict, state_dict
from megatron_tied.checkpoint.storage import read
from megatron_tied.checkpoint.together import of_every_rank
from megatron_tied.engine.partitions import WEIGHT, Fragment
from megatron_tied.exchange import gather_json

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
        missing = on_rank_0(lambda: _missing_latest(directory))
        if missing is not None:
            raise BrokenCheckpointError(directory.root / LATEST, f"names {missing}, which is not there")
    except BrokenCheckpointError as error:
        passed_over.append(error)
    for step in on_rank_0(directory.steps):
        try:
            return Found(verified(directory.path(step)), passed_over)
        except BrokenCheckpointError as error:
            passed_over.append(error)
    return Found(None, passed_over)


def _missing_latest(directory: CheckpointDirectory) -> str | None:
    latest = directory.latest()
    return None if latest is None or latest.is_dir() else latest.name


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
    tensors: StateDict = state_dict(whole, model_layout(model), saving=False)
    load(tensors | saved_buffers(model), checkpoint)


def saved_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that PyTorch would save, such as the routers' expert biases, by their names in a checkpoint."""
    names = model.state_dict().keys()
    return {f"buffer/{name}": value for name, value in model.named_buffers() if name in names}


def on_rank_0(action: Callable[[], _T]) -> _T:
    """What `action` finds on the first rank, for all: ranks may see a shared file system a moment apart; a collective.

    Told to them as JSON. Raises `BrokenCheckpointError` on every rank if it does there, or if something cannot be read.
    """
    outcome, failure = None, None
    if dist.get_rank() == 0:
        try:
            outcome = action()
        except (BrokenCheckpointError, OSError) as error:
            failure = _told(error)
    outcome, failure = gather_json([outcome, failure])[0]
    _raise(failure)
    return outcome


def _all_or_none(action: Callable[[], _T]) -> _T:
    """The result of `action` on this rank; if it fails on any, the first failure on all."""
    result, failure = None, None
    try:
        result = action()
    except (BrokenCheckpointError, OSError) as error:
        failure = _told(error)
    for found in gather_json(failure):
        _raise(found)
    return result


def _told(error: BrokenCheckpointError | OSError) -> list[str]:
    if isinstance(error, BrokenCheckpointError):
        return [str(error.path), error.cause]
    return [error.filename or ".", f"cannot be read: {error.strerror}"]


def _raise(told: list[str] | None) -> None:
    if told is not None:
        path, cause = told
        raise BrokenCheckpointError(Path(path), cause)
