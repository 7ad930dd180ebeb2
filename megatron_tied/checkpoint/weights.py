"""The weights of a checkpoint, one whole tensor at a time, for programs without process groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from megatron_tied.checkpoint.directory import resolve
from megatron_tied.checkpoint.manifest import Manifest
from megatron_tied.checkpoint.storage import tensor_key

_PREFIX = "weight/"


class WeightReader:
    """Reads weights by their names in the checkpoint (`layout.py` says what they are); never more than one tensor.

    `directory` is a checkpoint or a run. Raises `BrokenCheckpointError` for what is incomplete; that the files hold
    what was written is for `megatron-tied checkpoint verify` to say.
    """

    def __init__(self, directory: Path):
        self.directory = resolve(directory)
        self.manifest = Manifest.read(self.directory)
        self.manifest.check_presence(self.directory)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight's shape, by name."""
        found = self.manifest.tensors.items()
        return {name.removeprefix(_PREFIX): tuple(t.shape) for name, t in found if name.startswith(_PREFIX)}

    def read(self, name: str, *, state: str = "weight") -> torch.Tensor:
        """The whole weight `name`: float32 after training, in the source's precision after a conversion.

        `state` is "buffer" for what is no parameter, such as a router's expert bias.
        """
        key = f"{state}/{name}"
        entry = self.manifest.tensors[key]
        whole = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        for chunk in entry.chunks:
            with safe_open(self.directory / chunk.file, framework="pt") as file:
                place = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
                whole[place] = file.get_tensor(tensor_key(key, chunk.offsets))
        return whole

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight in turn, with its name."""
        for name in self.shapes():
            yield name, self.read(name)
