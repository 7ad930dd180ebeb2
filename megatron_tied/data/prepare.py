"""From text files to a Megatron indexed data set: PREFIX.bin, .idx, .json, and .model when one is trained."""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_tied.data.encode import Encoded, encode_all, usable_cpus
from megatron_tied.data.metadata import Metadata
from megatron_tied.data.sources import (
    Chunk,
    Source,
    Tally,
    check_records,
    documents,
    find_sources,
    read_chunks,
    sample,
)
from megatron_tied.data.staging import Staging
from megatron_tied.data.tokenizer import SAMPLE_BYTES, SentencePieceTokenizer, train_tokenizer
from megatron_tied.errors import ConfigError, Problem

SEED = 1234

# A Megatron index counts the tokens of a sequence in int32.
_MAX_SEQUENCE_TOKENS = 2**31 - 1
_SAMPLE_CHUNK_BYTES = 1 << 16
# Starting a worker takes about as long as encoding this much text.
_BYTES_WORTH_A_WORKER = 4 << 20


@dataclass(frozen=True)
class Prepared:
    """What `prepare_data` did: the data set's metadata, and how long it took on how many workers."""

    metadata: Metadata
    tokenizer: Path
    first_skipped: str
    seconds: float
    workers: int


def prepare_data(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: str | Path | None = None,
    vocab_size: int | None = None,
    jsonl_key: str = "text",
    workers: int | None = None,
    overwrite: bool = False,
    sample_bytes: int = SAMPLE_BYTES,
) -> Prepared:
    """Tokenise `inputs` into the data set `output`, with the model file `tokenizer` or one trained on them.

    When `tokenizer` is None, one of `vocab_size` pieces is trained on a random sample of `sample_bytes`. Each
    document ends with the separator. The files are the same whatever the number of `workers` (default: one
    per usable CPU), and appear only when complete, the metadata last. Raises `ConfigError` for bad input.
    """
    prefix = Path(output)
    _check(prefix, tokenizer, vocab_size, workers, sample_bytes)
    given = SentencePieceTokenizer.load(tokenizer, field="--tokenizer") if tokenizer else None
    sources = find_sources(inputs)
    check_records(sources, jsonl_key)
    total = sum(source.path.stat().st_size for source in sources)
    workers = min(workers or usable_cpus(), 1 + total // _BYTES_WORTH_A_WORKER)
    with Staging(prefix, overwrite=overwrite, writes_model=given is None) as staging:
        start = time.monotonic()
        if given is None:
            pieces = _trained(sources, total, jsonl_key, vocab_size or 0, sample_bytes)
            staging.path(".model").write_bytes(pieces.model)
        else:
            pieces = given
        writer = _Writer(staging, pieces.vocab_size)
        encoded = encode_all(read_chunks(sources), pieces, jsonl_key, workers)
        with closing(encoded) as batches, _bar(total, "tokenising") as bar:
            for batch in batches:
                writer.add(batch)
                bar.update(batch.disk_bytes)
        if not writer.documents:
            raise ConfigError(Problem("--input", [str(path) for path in inputs], "must hold text"))
        writer.finish()
        model = tokenizer or f"{prefix}.model"
        metadata = writer.metadata(pieces, os.path.relpath(model, prefix.parent))
        metadata.write(staging.path(".json"))
        staging.commit()
    return Prepared(metadata, Path(model), writer.tally.first_skipped, time.monotonic() - start, workers)


class _Writer:
    """Megatron-Core's indexed data set builder, fed with batches; a document's pieces become one sequence."""

    def __init__(self, staging: Staging, vocab_size: int) -> None:
        from megatron_tied import platform

        platform.prepare()
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self._index_path = str(staging.path(".idx"))
        self.dtype = np.dtype(DType.optimal_dtype(vocab_size))
        self._builder = IndexedDatasetBuilder(str(staging.path(".bin")), dtype=self.dtype.type)
        # The builder's lists would take some 40 bytes for each number; a corpus has many short documents.
        self._builder.sequence_lengths = array("i")
        self._builder.document_indices = array("q", [0])
        self._inside_document = False
        self.documents = 0
        self.tokens = 0
        self.max_token_id = -1
        self.tally = Tally()

    def add(self, batch: Encoded) -> None:
        import torch

        ids = torch.from_numpy(batch.ids)
        start = 0
        for length, ends in zip(batch.lengths, batch.ends, strict=True):
            self._builder.add_item(ids[start : start + length])
            start += length
            if self._inside_document:
                self._join_last_two()
            if ends:
                self._builder.end_document()
                self.documents += 1
            self._inside_document = not ends
        if start:
            self.max_token_id = max(self.max_token_id, int(batch.ids.max()))
        self.tokens += start
        self.tally.add(batch.tally)

    def finish(self) -> None:
        """Write the index; the builder closes both files."""
        self._builder.finalize(self._index_path)

    def metadata(self, tokenizer: SentencePieceTokenizer, tokenizer_path: str) -> Metadata:
        return Metadata(
            documents=self.documents,
            tokens=self.tokens,
            max_token_id=self.max_token_id,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
            dtype=self.dtype.name,
            tokenizer=tokenizer_path,
            tokenizer_sha256=tokenizer.sha256,
            source_bytes=self.tally.text_bytes,
            skipped_records=self.tally.skipped,
            empty_records=self.tally.empty,
            replaced_characters=self.tally.replaced,
        )

    def _join_last_two(self) -> None:
        # GPT data sets shuffle and split sequences, whatever document they are of.
        lengths = self._builder.sequence_lengths
        if lengths[-2] + lengths[-1] <= _MAX_SEQUENCE_TOKENS:
            last = lengths.pop()
            lengths[-1] += last


def _check(
    prefix: Path, tokenizer: str | Path | None, vocab_size: int | None, workers: int | None, sample_bytes: int
) -> None:
    problems = []
    if tokenizer is None and (vocab_size is None or vocab_size < 1):
        problems.append(Problem("--vocab-size", vocab_size, "must be an integer >= 1 to train a tokenizer"))
    if tokenizer is not None and vocab_size is not None:
        valid = "must be left out with --tokenizer, which has a vocabulary"
        problems.append(Problem("--vocab-size", vocab_size, valid))
    if workers is not None and workers < 1:
        problems.append(Problem("--workers", workers, "must be an integer >= 1"))
    if sample_bytes < 1:
        problems.append(Problem("--sample-mib", sample_bytes / 2**20, "must be > 0"))
    if not prefix.name or prefix.is_dir():
        problems.append(Problem("--output", str(prefix), "must be a prefix for file names, not a directory"))
    if problems:
        raise ConfigError(problems)


def _trained(
    sources: list[Source], total: int, jsonl_key: str, vocab_size: int, sample_bytes: int
) -> SentencePieceTokenizer:
    with _bar(total, "sampling") as bar:
        chunks = sample(_followed(read_chunks(sources, _SAMPLE_CHUNK_BYTES), bar), sample_bytes, SEED)
    texts = (text for chunk in chunks for text in documents(chunk, jsonl_key, Tally()))
    return train_tokenizer(texts, vocab_size, max_bytes=sample_bytes)


def _followed(chunks: Iterable[Chunk], bar: tqdm) -> Iterator[Chunk]:
    for chunk in chunks:
        yield chunk
        bar.update(chunk.disk_bytes)


def _bar(total: int, name: str) -> tqdm:
    """A progress bar on stderr where that is a terminal."""
    return tqdm(total=total, desc=name, unit="B", unit_scale=True, unit_divisor=1024, disable=None)
