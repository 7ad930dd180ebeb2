"""Encoding chunks of raw text to token ids, in this process or in many, always in the order of the input."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Literal

import numpy as np

from megatron_tied.data.adapters import Tokenizer
from megatron_tied.data.sources import CHUNK_BYTES, Chunk, Tally, documents

Place = Literal["before", "after"]


@dataclass
class Encoded:
    """The tokens of a batch of chunks: `ids` (int32 [tokens]) of all pieces, one after another.

    `lengths[i]` tokens belong to piece i; `ends[i]` says that piece i is the last of its document. `position` is that
    of the last chunk.
    """

    ids: np.ndarray
    lengths: list[int]
    ends: list[bool]
    tally: Tally
    disk_bytes: int
    position: tuple[int, ...]


@dataclass
class Encoder:
    """Turns a batch of chunks into `Encoded`; a record without tokens is counted, not written.

    Each document has one separator, `separator` it.
    """

    tokenizer: Tokenizer
    jsonl_key: str
    separator: Place = "after"

    def __call__(self, batch: list[Chunk]) -> Encoded:
        ids: list[int] = []
        lengths: list[int] = []
        ends: list[bool] = []
        tally = Tally()
        for chunk in batch:
            for text in documents(chunk, self.jsonl_key, tally):
                piece = self.tokenizer.encode(text)
                if not piece and chunk.is_jsonl:
                    tally.empty += 1
                    continue
                if self.separator == "before" and chunk.starts_document:
                    piece.insert(0, self.tokenizer.eod)
                if self.separator == "after" and chunk.ends_document:
                    piece.append(self.tokenizer.eod)
                ids += piece
                lengths.append(len(piece))
                ends.append(chunk.ends_document)
        disk_bytes = sum(chunk.disk_bytes for chunk in batch)
        return Encoded(np.array(ids, np.int32), lengths, ends, tally, disk_bytes, batch[-1].position)


def encode_all(chunks: Iterable[Chunk], encoder: Encoder, workers: int) -> Generator[Encoded, None, None]:
    """Encode `chunks` in batches on `workers` processes; batches come in order and few are held at a time.

    Raises `concurrent.futures.process.BrokenProcessPool` when a worker is killed.
    """
    batches = _batched(chunks)
    if workers == 1:
        yield from map(encoder, batches)
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, _start_worker, (encoder,))
    pending: deque[Future[Encoded]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_encode, batch))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def usable_cpus() -> int:
    """The CPUs this process may use, which in a container are often fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def _batched(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Small files travel to the workers together."""
    batch: list[Chunk] = []
    size = 0
    for chunk in chunks:
        batch.append(chunk)
        size += len(chunk.data)
        if size >= CHUNK_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_encoder: Encoder


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    # The parent answers Ctrl-C; and should it be killed, nobody else ends a worker that waits for its queue.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _encoder = encoder


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _encode(batch: list[Chunk]) -> Encoded:
    return _encoder(batch)
