"""Documents from text files, JSON Lines and directory trees, plain or compressed, in bounded memory.

The reading process only cuts files into `Chunk`s of raw bytes, which is fast enough to feed many workers;
decoding and JSON parsing is done by whoever calls `documents` on a chunk.
"""

from __future__ import annotations

import gzip
import heapq
import json
import os
import random
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import BinaryIO

import zstandard

from megatron_tied.errors import ConfigError, Problem

JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson", ".json"})
COMPRESSIONS = frozenset({".gz", ".zst"})
# What is read of a directory tree. Other files (.json, .csv, .xml) are read when they are named themselves.
_PROSE = ".txt .text .md .markdown .rst .tex .org .adoc .html .htm .jsonl .ndjson"
_CODE = """
.py .pyi .pyx .c .h .cc .cpp .cxx .hpp .cu .cuh .java .kt .scala .go .rs .swift .js .jsx .ts .tsx .rb .php .pl
.lua .r .jl .hs .ml .sh .bash .sql .css .cs .f90 .cmake .toml .yaml .yml .cfg .ini
"""
TREE_SUFFIXES = frozenset((_PROSE + _CODE).split())
CHUNK_BYTES = 1 << 20
MAX_RECORD_BYTES = 256 << 20

_BOM = b"\xef\xbb\xbf"
_BLOCK_BYTES = 1 << 16
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Source:
    """One input file. Its suffixes say how to read it: `.jsonl`, then `.gz` or `.zst`; all else is text."""

    path: Path

    @property
    def compression(self) -> str:
        """`.gz` or `.zst`, or nothing."""
        suffix = self.path.suffix.lower()
        return suffix if suffix in COMPRESSIONS else ""

    @property
    def suffix(self) -> str:
        """The suffix under the compression's."""
        return (Path(self.path.stem) if self.compression else self.path).suffix.lower()

    @property
    def is_jsonl(self) -> bool:
        """Whether it is read as JSON Lines."""
        return self.suffix in JSONL_SUFFIXES


@dataclass(frozen=True, slots=True)
class Chunk:
    """Whole lines of a JSON Lines file, or a piece of a text file, which is one document.

    `position` is where its source goes on after it, for sources that can be read from there.
    """

    data: bytes
    path: str
    is_jsonl: bool
    first_line: int
    starts_document: bool
    ends_document: bool
    disk_bytes: int
    position: tuple[int, ...] = ()


@dataclass
class Tally:
    """What was read: UTF-8 bytes of text, and what could not be taken as it was."""

    text_bytes: int = 0
    empty: int = 0
    skipped: int = 0
    replaced: int = 0
    first_skipped: str = ""

    def add(self, other: Tally) -> None:
        """Add what `other` has counted, which came later."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            setattr(self, field.name, mine or theirs if field.name == "first_skipped" else mine + theirs)


def find_sources(inputs: Sequence[str | Path]) -> list[Source]:
    """The files of `inputs`, in the order given; a directory stands for its tree's files, sorted by name.

    In a tree, hidden entries and suffixes other than `TREE_SUFFIXES` (plain or compressed) are passed over.
    Raises `ConfigError` for inputs that are missing, unreadable, or directories without a usable file.
    """
    sources: list[Source] = []
    problems = []
    for named in inputs:
        given = Path(named)
        found = list(_walk(given)) if given.is_dir() else [Source(given)] if given.is_file() else None
        # Of an empty name Path makes the working directory.
        if found is None or not str(named):
            problems.append(Problem("--input", str(named), "must be an existing file or directory"))
        elif not found:
            valid = f"must hold at least one text file ({', '.join(sorted(TREE_SUFFIXES))}, also .gz or .zst)"
            problems.append(Problem("--input", str(given), valid))
        else:
            unreadable = [source.path for source in found if not os.access(source.path, os.R_OK)]
            problems += [Problem("--input", str(path), "must be readable") for path in unreadable]
            sources += found
    if problems:
        raise ConfigError(problems)
    return sources


def check_records(sources: Iterable[Source], jsonl_key: str) -> None:
    """Look at the first record of every JSON Lines file, so that a wrong key is not found out after hours.

    Raises `ConfigError` when one is not an object or has no text under `jsonl_key`.
    """
    problems = []
    for source in sources:
        if not source.is_jsonl:
            continue
        chunk = next(read_chunks([source], _BLOCK_BYTES), None)
        line = next((line for line in chunk.data.split(b"\n") if line.strip()), None) if chunk else None
        if line is None:
            continue
        record = _parsed(line.decode(errors="replace"))
        if not isinstance(record, dict):
            valid = "must hold one JSON object per line; its first record is none"
            problems.append(Problem("--input", str(source.path), valid))
        elif not isinstance(record.get(jsonl_key), str):
            texts = ", ".join(repr(key) for key, value in record.items() if isinstance(value, str))
            valid = f"must be a key of text in {source.path}, which has {texts or 'none'}"
            problems.append(Problem("--jsonl-key", jsonl_key, valid))
    if problems:
        raise ConfigError(problems)


def read_chunks(sources: Iterable[Source], chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Cut files into chunks of about `chunk_bytes` (a JSON record is never cut, a line only if it is longer).

    Raises `ConfigError` on a corrupt or truncated compressed file and on a record above `MAX_RECORD_BYTES`.
    """
    for source in sources:
        with source.path.open("rb") as file:
            try:
                yield from _chunks_of(source, file, chunk_bytes)
            except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
                valid = f"must be a whole {source.compression} file ({error})"
                raise ConfigError(Problem("--input", str(source.path), valid)) from None


def documents(chunk: Chunk, jsonl_key: str, tally: Tally) -> Iterator[str]:
    """The texts of a chunk: one per record of JSON Lines, else one piece of a document. Adds to `tally`.

    Bytes that are not UTF-8 (and lone surrogates of JSON) become U+FFFD; records that are no JSON object or
    have no text under `jsonl_key` are skipped. Both are counted.
    """
    if not chunk.is_jsonl:
        yield _counted(_decoded(chunk.data, tally), tally)
        return
    for number, line in enumerate(chunk.data.split(b"\n"), chunk.first_line):
        if not line.strip():
            continue
        record = _parsed(_decoded(line, tally))
        text = record.get(jsonl_key) if isinstance(record, dict) else None
        if isinstance(text, str):
            yield _counted(text, tally)
        else:
            tally.skipped += 1
            tally.first_skipped = tally.first_skipped or f"{chunk.path}:{number}"


def sample(chunks: Iterable[Chunk], max_bytes: int, seed: int) -> list[Chunk]:
    """A uniform random sample of `chunks`, `max_bytes` in all, in their order. Same seed, same sample."""
    draw = random.Random(seed)
    kept: list[tuple[float, int, Chunk]] = []
    size = 0
    for number, chunk in enumerate(chunks):
        heapq.heappush(kept, (draw.random(), number, chunk))
        size += len(chunk.data)
        while size > max_bytes and len(kept) > 1:
            size -= len(heapq.heappop(kept)[2].data)
    return [chunk for _, _, chunk in sorted(kept, key=lambda entry: entry[1])]


def _walk(root: Path) -> Iterator[Source]:
    def fail(error: OSError) -> None:
        raise ConfigError(Problem("--input", error.filename, f"must be readable ({error.strerror})"))

    for folder, directories, names in os.walk(root, onerror=fail):
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        for name in sorted(names):
            source = Source(Path(folder, name))
            if not name.startswith(".") and source.suffix in TREE_SUFFIXES and source.path.is_file():
                yield source


def _chunks_of(source: Source, file: BinaryIO, chunk_bytes: int) -> Iterator[Chunk]:
    line, position, starts = 1, 0, True
    pieces = _cut(_blocks(source, file, chunk_bytes), source)
    data = next(pieces, b"").removeprefix(_BOM) or next(pieces, b"")
    while data:
        following = next(pieces, b"")
        ends = source.is_jsonl or not following
        yield Chunk(data, str(source.path), source.is_jsonl, line, starts, ends, file.tell() - position)
        line, position, starts = line + data.count(b"\n"), file.tell(), source.is_jsonl
        data = following


def _blocks(source: Source, file: BinaryIO, size: int) -> Iterator[bytes]:
    if source.compression == ".zst":
        yield from _zstd_blocks(file)
    else:
        stream = gzip.GzipFile(fileobj=file) if source.compression else file
        while block := stream.read(size):
            yield block


def _zstd_blocks(file: BinaryIO) -> Iterator[bytes]:
    """zstandard's own stream reader takes a truncated file for a short one: follow the frames here."""
    # Long-distance archives use windows up to 2 GiB; memory is taken only as a file asks for it.
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = decompressor.decompressobj()
    inside = False
    while data := file.read(_BLOCK_BYTES):
        while data:
            yield frame.decompress(data)
            data, inside = frame.unused_data, not frame.eof
            if not inside:
                frame = decompressor.decompressobj()
    if inside:
        raise EOFError("it ends within a frame")


def _cut(blocks: Iterable[bytes], source: Source) -> Iterator[bytes]:
    """Join and cut blocks to end at a line end, or, within a long line of text, at a character's end."""
    held: list[bytes] = []
    for block in blocks:
        end = block.rfind(b"\n") + 1
        if not end and not source.is_jsonl:
            end = _last_character(block)
        if end:
            yield b"".join((*held, block[:end]))
            held = [block[end:]]
        else:
            held.append(block)
            if sum(map(len, held)) > MAX_RECORD_BYTES:
                valid = f"must have records of at most {MAX_RECORD_BYTES >> 20} MiB, one JSON object per line"
                raise ConfigError(Problem("--input", str(source.path), valid))
    if rest := b"".join(held):
        yield rest


def _last_character(block: bytes) -> int:
    """Where the last UTF-8 character of `block` begins: cutting there splits none. 0 when it begins before."""
    continuation = 0b10
    for at in range(len(block) - 1, max(len(block) - 5, -1), -1):
        if block[at] >> 6 != continuation:
            return at
    return len(block) if len(block) > 3 else 0  # no character has four such bytes


def _decoded(data: bytes, tally: Tally) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        text = data.decode(errors="replace")
        tally.replaced += text.count("\ufffd") - data.count("\ufffd".encode())
        return text


def _parsed(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _counted(text: str, tally: Tally) -> str:
    try:
        tally.text_bytes += len(text.encode())
    except UnicodeEncodeError:
        text, count = _SURROGATE.subn("\ufffd", text)
        tally.replaced += count
        tally.text_bytes += len(text.encode())
    return text
