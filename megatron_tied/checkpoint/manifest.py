"""`manifest.json`: what a checkpoint holds, in which files, with their checksums. Read without torch."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

FORMAT = 1
NAME = "manifest.json"
_READ_BYTES = 1 << 22


class BrokenCheckpointError(ValueError):
    """A checkpoint that must not be used: which file or directory, and what is wrong with it."""

    def __init__(self, *told: Path | str):
        super().__init__(": ".join(map(str, told)))


@dataclass(frozen=True)
class File:
    """A data file as it was when the checkpoint was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a tensor: the file that has it, where in the tensor it begins, and its shape."""

    file: str
    offsets: list[int]
    sizes: list[int]


@dataclass(frozen=True)
class Tensor:
    """A whole tensor, named `state/name`; its chunks cover it once. `dtype` as torch names it, such as float32."""

    dtype: str
    shape: list[int]
    chunks: list[Chunk]

    def is_covered_once(self) -> bool:
        """Whether every element is in one chunk, and in no more, and nothing else is in any.

        Takes no comparison of each chunk with all others: how often elements are covered changes at corners of chunks
        only. Counted with alternating signs, corners within the tensor must cancel, and its own remain.
        """
        corners: Counter[tuple[int, ...]] = Counter()
        for chunk in self.chunks:
            corners.update(_corners(chunk.offsets, chunk.sizes))
        corners.subtract(_corners([0] * len(self.shape), self.shape))
        return not any(corners.values())


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`.

    run: the resolved config of the run. trainer: what is neither tensor nor config, such as the step of the schedule.
    """

    step: int
    consumed_samples: int
    world_size: int
    software: str
    run: dict[str, Any]
    trainer: dict[str, Any]
    files: dict[str, File] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    format: int = FORMAT

    def write(self, directory: Path) -> Path:
        """Write the file, with a checksum of its own; returns its path."""
        content = asdict(self)
        path = directory / NAME
        path.write_text(json.dumps(content | {"checksum": _checksum(content)}), encoding="utf-8")
        return path

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """The manifest of the checkpoint in `directory`. Raises `BrokenCheckpointError`; opens no other file."""
        path = directory / NAME
        if not directory.is_dir():
            raise BrokenCheckpointError(directory, "is no directory")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BrokenCheckpointError(directory, f"is no complete checkpoint: it has no {NAME}") from None
        except (OSError, ValueError) as error:
            raise BrokenCheckpointError(path, f"cannot be read: {error}") from None
        if not isinstance(content, dict) or not isinstance(content.get("format"), int):
            raise BrokenCheckpointError(path, "is no manifest of a checkpoint")
        if content["format"] != FORMAT:
            age = "a newer" if content["format"] > FORMAT else "an older"
            valid = f"is of format {content['format']}, of {age} version of this software; this one reads {FORMAT}"
            raise BrokenCheckpointError(path, valid)
        if content.pop("checksum", None) != _checksum(content):
            raise BrokenCheckpointError(path, "is damaged: it does not match its own checksum")
        files = {name: File(**file) for name, file in content.pop("files").items()}
        tensors = {name: _tensor(**tensor) for name, tensor in content.pop("tensors").items()}
        return cls(**content, files=files, tensors=tensors)

    def check_presence(self, directory: Path) -> None:
        """Raise `BrokenCheckpointError` if a file is missing or has another size; reads no data."""
        for name, file in self.files.items():
            path = directory / name
            try:
                size = path.stat().st_size
            except OSError as error:
                raise BrokenCheckpointError(path, f"is missing: {error.strerror}") from None
            if size != file.bytes:
                kind = "is truncated" if size < file.bytes else "is too long"
                raise BrokenCheckpointError(path, f"{kind}: {size:,} bytes instead of {file.bytes:,}")

    def check_file(self, directory: Path, name: str) -> None:
        """Read the file `name` and raise `BrokenCheckpointError` if it is not what was written."""
        path = directory / name
        try:
            found = sha256(path)
        except OSError as error:
            raise BrokenCheckpointError(path, f"cannot be read: {error}") from None
        if found != self.files[name].sha256:
            raise BrokenCheckpointError(path, "is damaged: its content does not match its checksum")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    for part in _parts(path):
        digest.update(part)
    return digest.hexdigest()


def _parts(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while part := file.read(_READ_BYTES):
            yield part


def _corners(offsets: list[int], sizes: list[int]) -> Counter[tuple[int, ...]]:
    """The corners of a rectangle: 1 for the one nearest to the origin and all that differ from it in 2, 4, ... axes.

    The others count -1.
    """
    found: Counter[tuple[int, ...]] = Counter()
    for ends in product((0, 1), repeat=len(sizes)):
        # Added, for where a side is 0 long two corners are one place.
        found[tuple(o + end * n for o, n, end in zip(offsets, sizes, ends, strict=True))] += (-1) ** sum(ends)
    return found


def _tensor(dtype: str, shape: list[int], chunks: list[dict[str, Any]]) -> Tensor:
    return Tensor(dtype, shape, [Chunk(**chunk) for chunk in chunks])


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
