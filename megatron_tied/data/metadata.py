"""What describes the tokens of PREFIX.bin: PREFIX.json, which is ours, and PREFIX.idx, Megatron's own."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

FORMAT = "megatron-tied data 1"

_INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, type code, sequences, documents
_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_SCAN_TOKENS = 1 << 24


@dataclass(frozen=True)
class Metadata:
    """The content of PREFIX.json, the last file of a data set to appear.

    `tokenizer` is a path relative to PREFIX.json's directory, or the name of a tiktoken encoding. `source` says which
    rows of which data set of `datasets` the text is; None for files.
    """

    documents: int
    tokens: int
    max_token_id: int
    vocab_size: int
    eod: int
    dtype: str
    tokenizer: str
    tokenizer_sha256: str
    source_bytes: int
    skipped_records: int
    empty_records: int
    replaced_characters: int
    separator: str = "after"
    source: Mapping[str, object] | None = None
    format: str = FORMAT

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, prefix: Path) -> Metadata | None:
        """The metadata, None when Megatron's own tools made the data set; ValueError when unreadable."""
        try:
            content = json.loads(with_suffix(prefix, ".json").read_text())
            metadata = cls(**content)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"is no metadata of prepare-data ({error})") from None
        if metadata.format != FORMAT:
            raise ValueError(f"has format {metadata.format!r}, known is {FORMAT!r}")
        return metadata


@dataclass(frozen=True)
class Index:
    """PREFIX.idx: the token type, and `lengths`, the tokens of each sequence (int32, memory-mapped)."""

    dtype: np.dtype
    lengths: np.ndarray

    @property
    def tokens(self) -> int:
        """The tokens of all sequences."""
        return int(self.lengths.sum(dtype=np.int64))

    @classmethod
    def read(cls, prefix: Path) -> Index:
        """Read and check a data set's index. Raises ValueError when it is broken or PREFIX.bin is shorter."""
        path = with_suffix(prefix, ".idx")
        with path.open("rb") as file:
            head = file.read(_INDEX_HEADER.size)
        if len(head) < _INDEX_HEADER.size or not head.startswith(_INDEX_MAGIC):
            raise ValueError("is not the index of a Megatron data set")
        _, version, code, sequences, documents = _INDEX_HEADER.unpack(head)
        if version != 1 or code not in _TYPES:
            raise ValueError(f"has version {version} and type code {code}, which hold no token ids")
        if path.stat().st_size < _INDEX_HEADER.size + 12 * sequences + 8 * documents:
            raise ValueError("is truncated")
        lengths = np.zeros(0, np.int32)
        if sequences:
            lengths = np.memmap(path, np.int32, "r", offset=_INDEX_HEADER.size, shape=(sequences,))
        index = cls(np.dtype(_TYPES[code]), lengths)
        if with_suffix(prefix, ".bin").stat().st_size < index.tokens * index.dtype.itemsize:
            raise ValueError(f"promises {index.tokens} tokens, more than {prefix}.bin holds")
        return index


def describe(prefix: Path) -> tuple[Index, Metadata | None]:
    """What the files of the data set `prefix` say of it. Raises ValueError for what is none, or is broken."""
    if not (with_suffix(prefix, ".bin").is_file() and with_suffix(prefix, ".idx").is_file()):
        raise ValueError("must be the prefix of a data set, which has .bin and .idx files: see prepare-data")
    return Index.read(prefix), Metadata.read(prefix)


def largest_token_id(prefix: Path, dtype: np.dtype) -> int:
    """The largest id in PREFIX.bin, found by reading all of it in bounded memory; -1 when it is empty."""
    largest = -1
    with with_suffix(prefix, ".bin").open("rb") as file:
        while (ids := np.fromfile(file, dtype, _SCAN_TOKENS)).size:
            largest = max(largest, int(ids.max()))
    return largest


def with_suffix(prefix: Path, suffix: str) -> Path:
    """PREFIX + suffix; a dot in PREFIX is kept, which `Path.with_suffix` would not."""
    return prefix.with_name(prefix.name + suffix)
