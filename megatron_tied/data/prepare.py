"""From text to a Megatron indexed data set: PREFIX.bin, .idx, .json, and .model when a tokenizer is trained."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from megatron_tied.data.adapters import Tokenizer, is_tiktoken, load_tokenizer
from megatron_tied.data.encode import Encoder, Place, encode_all, usable_cpus
from megatron_tied.data.metadata import Metadata, with_suffix
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
from megatron_tied.data.stream import TEXT, Request, Stream
from megatron_tied.data.tokenizer import SAMPLE_BYTES, SentencePieceTokenizer, train_tokenizer
from megatron_tied.data.writer import Writer
from megatron_tied.errors import ConfigError, Problem

SEED = 1234

_SAMPLE_CHUNK_BYTES = 1 << 16
# Starting a worker takes about as long as encoding this much text.
_BYTES_WORTH_A_WORKER = 4 << 20
# How much text an interrupted run may have to encode again.
_SAVE_BYTES = 256 << 20
_MOST_PIECES = 2**31 - 1  # which SentencePiece can count


@dataclass(frozen=True)
class Prepared:
    """What was done: the data set's metadata, and how long `text_bytes` of it took on how many workers.

    The other bytes are of runs before, which were interrupted.
    """

    metadata: Metadata
    tokenizer: str | Path
    first_skipped: str
    seconds: float
    workers: int
    text_bytes: int


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
    separator: Place = "after",
) -> Prepared:
    """Tokenise `inputs` into the data set `output`, with the tokenizer of that name or one trained on them.

    When `tokenizer` is None, one of `vocab_size` pieces is trained on a random sample of `sample_bytes`. Each
    document has one separator. The files are the same whatever the number of `workers` (default: one per usable
    CPU), and appear only when complete, the metadata last. Raises `ConfigError` for bad input.
    """
    prefix = Path(output)
    _check(prefix, tokenizer, vocab_size, workers, sample_bytes)
    given = load_tokenizer(tokenizer, field="--tokenizer") if tokenizer is not None else None
    sources = find_sources(inputs)
    check_records(sources, jsonl_key)
    total = sum(source.path.stat().st_size for source in sources)
    workers = min(workers or usable_cpus(), 1 + total // _BYTES_WORTH_A_WORKER)
    with Staging(prefix, overwrite=overwrite, writes_model=given is None) as staging:
        start = time.monotonic()
        pieces: Tokenizer
        if given is None:
            pieces = _trained(sources, total, jsonl_key, vocab_size or 0, sample_bytes)
            staging.path(".model").write_bytes(pieces.model)
        else:
            pieces = given
        writer = Writer(staging, pieces)
        encoded = encode_all(read_chunks(sources), Encoder(pieces, jsonl_key, separator), workers)
        with closing(encoded) as batches, _bar(total, "tokenising") as bar:
            for batch in batches:
                writer.add(batch)
                bar.update(batch.disk_bytes)
        if not writer.documents:
            raise ConfigError(Problem("--input", [str(path) for path in inputs], "must hold text"))
        model = with_suffix(prefix, ".model") if tokenizer is None else tokenizer
        metadata = writer.finish(_seen_from(prefix, model), separator, None)
        staging.commit()
    seconds = time.monotonic() - start
    return Prepared(metadata, model, writer.tally.first_skipped, seconds, workers, metadata.source_bytes)


def prepare_dataset(
    request: Request,
    output: str | Path,
    *,
    tokenizer: str | Path,
    max_tokens: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    separator: Place = "after",
) -> Prepared:
    """Tokenise the rows that `request` names into the data set `output`, until it has `max_tokens` or they end.

    The documents that are encoded together are written together, so that it may be as many tokens more as 1 MiB of text
    has. A run that was interrupted is gone on with by the next one that asks for the same, and the files are those of
    one run. Otherwise as `prepare_data`; raises OSError when the rows cannot be read.
    """
    prefix = Path(output)
    _check(prefix, tokenizer, None, workers, SAMPLE_BYTES)
    _check_amount(request, max_tokens)
    pieces = load_tokenizer(tokenizer, field="--tokenizer")
    stream = Stream(request)
    workers = workers or usable_cpus()
    source = stream.identity() | {"max_tokens": max_tokens}
    asked = source | {"separator": separator, "tokenizer_sha256": pieces.sha256}
    with Staging(prefix, overwrite=overwrite, writes_model=False, request=asked) as staging:
        start = time.monotonic()
        writer = Writer(staging, pieces)
        saved = before = writer.tally.text_bytes
        end = float("inf") if max_tokens is None else max_tokens
        encoded = encode_all(stream.chunks(writer.position), Encoder(pieces, TEXT, separator), workers)
        bar = tqdm(
            total=max_tokens, initial=writer.tokens, desc="tokenising", unit="tok", unit_scale=True, disable=None
        )
        with closing(encoded) as batches, bar:
            while writer.tokens < end and (batch := next(batches, None)) is not None:
                writer.add(batch)
                bar.update(len(batch.ids))
                if writer.tally.text_bytes - saved >= _SAVE_BYTES:
                    writer.save(batch.position)
                    saved = writer.tally.text_bytes
        if not writer.documents:
            raise ConfigError(Problem("--dataset", request.dataset, "must hold text in the rows that are asked for"))
        metadata = writer.finish(_seen_from(prefix, tokenizer), separator, source)
        staging.commit()
    seconds, text_bytes = time.monotonic() - start, metadata.source_bytes - before
    return Prepared(metadata, tokenizer, writer.tally.first_skipped, seconds, workers, text_bytes)


def _seen_from(prefix: Path, tokenizer: str | Path) -> str:
    return str(tokenizer) if is_tiktoken(tokenizer) else os.path.relpath(tokenizer, prefix.parent)


def _check(
    prefix: Path, tokenizer: str | Path | None, vocab_size: int | None, workers: int | None, sample_bytes: int
) -> None:
    problems = []
    if tokenizer is None and not 1 <= (vocab_size or 0) <= _MOST_PIECES:
        valid = f"must be an integer of 1 to {_MOST_PIECES:,} to train a tokenizer"
        problems.append(Problem("--vocab-size", vocab_size, valid))
    if tokenizer == "":
        problems.append(Problem("--tokenizer", "", "must be a file, a directory, or tiktoken:NAME"))
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


def _check_amount(request: Request, max_tokens: int | None) -> None:
    counts = {"--max-tokens": max_tokens, "--max-rows": request.max_rows}
    problems = [Problem(field, n, "must be an integer >= 1") for field, n in counts.items() if n is not None and n < 1]
    if request.skip_rows < 0:
        problems.append(Problem("--skip-rows", request.skip_rows, "must be an integer >= 0"))
    if problems:
        raise ConfigError(problems)


def _trained(
    sources: list[Source], total: int, jsonl_key: str, vocab_size: int, sample_bytes: int
) -> SentencePieceTokenizer:
    with _bar(total, "sampling") as bar:
        chunks = sample(_followed(read_chunks(sources, _SAMPLE_CHUNK_BYTES), bar), sample_bytes, SEED)
    texts = (text for chunk in chunks for text in documents(chunk, jsonl_key, Tally()))
    return train_tokenizer(texts, vocab_size, max_bytes=sample_bytes)


def _followed(chunks: Iterable[Chunk], bar: tqdm[NoReturn]) -> Iterator[Chunk]:
    for chunk in chunks:
        yield chunk
        bar.update(chunk.disk_bytes)


def _bar(total: int, name: str) -> tqdm[NoReturn]:
    """A progress bar on stderr where that is a terminal."""
    return tqdm(total=total, desc=name, unit="B", unit_scale=True, unit_divisor=1024, disable=None)
