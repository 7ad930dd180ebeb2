"""Safetensors files of bounded size, written one after another; no more than one of them is ever in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_tied.checkpoint.manifest import File, sha256
from megatron_tied.files import sync

# Of a file, unless a single tensor is larger.
LIMIT = 256 << 20


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file; a full disk, which the library has an error of its own for, is an `OSError`."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None


class ShardWriter:
    """Collects tensors into files named by `name_of(number)`, from 1, each flushed to its device."""

    def __init__(self, directory: Path, name_of: Callable[[int], str]):
        self._directory = directory
        self._name_of = name_of
        self._pending: dict[str, torch.Tensor] = {}
        self._bytes = 0
        self._written: list[str] = []
        self.file_of: dict[str, str] = {}
        self.total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor; it is written when enough have come, at the latest by `finish`."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._bytes + size > LIMIT:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._bytes += size
        self.total_bytes += size
        self.file_of[name] = self._name_of(len(self._written) + 1)

    def finish(self) -> list[str]:
        """Write what is left; returns the names of all files."""
        if self._pending:
            self._flush()
        return self._written

    def checksums(self) -> dict[str, File]:
        """Size and SHA-256 of each file, read back from it."""
        paths = [self._directory / name for name in self._written]
        return {path.name: File(path.stat().st_size, sha256(path)) for path in paths}

    def _flush(self) -> None:
        path = self._directory / self._name_of(len(self._written) + 1)
        save(self._pending, path)
        # The library gives it to its owner alone.
        path.chmod(self._directory.stat().st_mode & 0o666)
        sync(path)
        self._written.append(path.name)
        self._pending, self._bytes = {}, 0
