"""The SentencePiece tokenizer: loading, encoding in bounded memory, and training on a stream of text."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_tied.errors import ConfigError, Problem

SEPARATOR = "<|endoftext|>"
SAMPLE_BYTES = 8 << 20

# BPE's time grows faster than its input: short pieces are nearly twice as fast as pieces of a megabyte.
_PIECE_CHARS = 8192
_MAX_PIECE_CHARS = 1 << 20
_SENTENCE_CHARS = 4096
_ERRORS_ONLY = 2


class SentencePieceTokenizer:
    """A SentencePiece model, of which `model` is the content of a .model file.

    Raises `ConfigError` naming `field` and `source` when it is not one, or defines no piece that can end a document.
    """

    def __init__(self, model: bytes, *, field: str = "tokenizer", source: str = "model") -> None:
        try:
            if not model:
                raise RuntimeError
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise ConfigError(Problem(field, source, "must be a SentencePiece model file")) from None
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.piece_size()
        separator = self._id_of(SEPARATOR)
        eod = self.eos if separator is None else separator
        if eod is None:
            valid = f"must define the piece {SEPARATOR} or an end-of-sentence piece, to end documents with"
            raise ConfigError(Problem(field, source, valid))
        self.eod: int = eod

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model,)

    @classmethod
    def load(cls, path: str | Path, *, field: str = "tokenizer") -> SentencePieceTokenizer:
        """Read a model file; a missing or unreadable one is a `ConfigError` about `field`."""
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            kinds = "a SentencePiece model, a Hugging Face directory or its tokenizer.json, or tiktoken:NAME"
            valid = f"must be {kinds} ({error.strerror})"
            raise ConfigError(Problem(field, str(path), valid)) from None
        return cls(model, field=field, source=str(path))

    @property
    def bos(self) -> int | None:
        """Id of the beginning-of-sentence piece, None when the model has none."""
        return _defined(self._processor.bos_id())

    @property
    def eos(self) -> int | None:
        """Id of the end-of-sentence piece, None when the model has none."""
        return _defined(self._processor.eos_id())

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without separator.

        Long text is encoded in pieces cut after line ends. That changes nothing when the model treats lines
        independently, as those of `train_tokenizer` do; other models get pieces of a megabyte.
        """
        ids: list[int] = []
        for piece in self._pieces(text):
            ids += self._processor.encode_as_ids(piece)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; a separator that is a control piece decodes to nothing."""
        text: str = self._processor.decode(list(ids))
        return text

    def _pieces(self, text: str) -> Iterator[str]:
        wanted = _PIECE_CHARS if self._lines_are_independent else _MAX_PIECE_CHARS
        start = 0
        while len(text) - start > wanted:
            end = text.find("\n", start + wanted - 1, start + wanted + _MAX_PIECE_CHARS) + 1
            end = end or min(start + wanted + _MAX_PIECE_CHARS, len(text))
            yield text[start:end]
            start = end
        yield text[start:]

    @cached_property
    def _lines_are_independent(self) -> bool:
        pieces = self._processor.id_to_piece(list(range(self.vocab_size)))
        encode = self._processor.encode_as_ids
        return not any("\n" in piece for piece in pieces) and encode("a\nb") == encode("a\n") + encode("b")

    def _id_of(self, piece: str) -> int | None:
        index = self._processor.piece_to_id(piece)
        return index if self._processor.id_to_piece(index) == piece else None


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, max_bytes: int = SAMPLE_BYTES) -> SentencePieceTokenizer:
    """Train a BPE model on at most `max_bytes` of `texts` (UTF-8).

    The model is lossless (byte fallback, no normalisation, no dummy prefix) except that SentencePiece's own
    mark U+2581 decodes to a space. The separator is a control piece: no document can spell it. Training is
    deterministic. Memory: some 25 bytes per byte of ordinary text, some 100 per byte of text without spaces.
    Raises `ConfigError` when `vocab_size` does not fit the text, or when there is no text.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts, max_bytes),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            control_symbols=[SEPARATOR],
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            max_sentence_length=4 * _SENTENCE_CHARS,
            minloglevel=_ERRORS_ONLY,
        )
    except RuntimeError as error:
        problem = _training_problem(str(error), vocab_size)
        if problem is None:
            raise
        raise ConfigError(problem) from None
    return SentencePieceTokenizer(model.getvalue())


def _sentences(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    left = max_bytes
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), _SENTENCE_CHARS):
                sentence = line[start : start + _SENTENCE_CHARS]
                left -= len(sentence.encode())
                if left < 0:
                    return
                yield sentence


def _training_problem(message: str, vocab_size: int) -> Problem | None:
    """SentencePiece names what is possible only in its message."""
    if "sentences_.empty()" in message:
        return Problem("--input", None, "must hold text to train a tokenizer on")
    if found := re.search(r"too high .* <= (\d+)", message):
        return Problem("--vocab-size", vocab_size, f"must be <= {found[1]} for this much text")
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        valid = f"must be >= {found[1]} for this text (256 bytes, 2 special pieces, and its characters)"
        return Problem("--vocab-size", vocab_size, valid)
    return None


def _defined(index: int) -> int | None:
    return None if index < 0 else index
