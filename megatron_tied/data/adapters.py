"""Whatever tokenizer a run names, by one interface: SentencePiece, Hugging Face's tokenizers, or tiktoken."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_tied.data.tokenizer import SEPARATOR, SentencePieceTokenizer
from megatron_tied.errors import ConfigError, Problem

if TYPE_CHECKING:
    import tiktoken

TIKTOKEN = "tiktoken:"
VOCABULARY = "tokenizer.json"
_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")


class Tokenizer(Protocol):
    """Text to ids below `vocab_size` and back; `eod` separates documents, and no text spells it.

    `sha256` is of all that decides about ids: data sets made by tokenizers of one sha256 go together. Tokenizers
    can be pickled.
    """

    sha256: str
    vocab_size: int
    eod: int

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without separator."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids."""


def load_tokenizer(name: str | Path, *, field: str = "tokenizer") -> Tokenizer:
    """The tokenizer `name`: `tiktoken:` and an encoding, a Hugging Face directory or its tokenizer.json, else a
    SentencePiece model file. Raises `ConfigError` about `field` for what is none of them, or has no separator.
    """
    if is_tiktoken(name):
        return TiktokenTokenizer.load(str(name), field=field)
    if Path(name).is_dir() or Path(name).name == VOCABULARY:
        return HuggingFaceTokenizer.load(name, field=field)
    return SentencePieceTokenizer.load(name, field=field)


def is_tiktoken(name: str | Path) -> bool:
    """Whether `name` is an encoding's and not a path."""
    return str(name).startswith(TIKTOKEN)


def vocabulary_file(name: str | Path) -> Path | None:
    """The file that has the vocabulary of the tokenizer `name`; None for tiktoken, which keeps its own."""
    if is_tiktoken(name):
        return None
    return Path(name) / VOCABULARY if Path(name).is_dir() else Path(name)


class HuggingFaceTokenizer:
    """A tokenizer.json, of which `vocabulary` is the content, by Hugging Face's `tokenizers`: no code is run.

    `end` is the token that ends a text where there is no token `<|endoftext|>`. Raises `ConfigError` naming `field` and
    `source` when it is no tokenizer, or has neither.
    """

    def __init__(self, vocabulary: str, end: str | None, *, field: str = "tokenizer", source: str = VOCABULARY) -> None:
        try:
            from tokenizers import Tokenizer as Loaded
        except ImportError:
            raise ConfigError(_needs(field, source, "tokenizers", "hf")) from None
        try:
            self._tokenizer = Loaded.from_str(vocabulary)
        except Exception as error:  # tokenizers has no narrower one
            raise ConfigError(Problem(field, source, f"must be a {VOCABULARY} ({error})")) from None
        self._content = (vocabulary, end)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        eod = ids.get(SEPARATOR)
        if eod is None and end is not None:
            eod = ids.get(end)
        if eod is None:
            valid = f"must have the token {SEPARATOR}, or an eos_token in {_CONFIGS[0]}, to separate documents with"
            raise ConfigError(Problem(field, source, valid))
        self.eod: int = eod
        self.vocab_size: int = max(ids.values()) + 1
        self.sha256 = hashlib.sha256(f"{vocabulary}\0{eod}".encode()).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._content

    @classmethod
    def load(cls, path: str | Path, *, field: str = "tokenizer") -> HuggingFaceTokenizer:
        """Read a directory's tokenizer.json, or the file, and the eos_token that the files beside it name."""
        file = Path(path) / VOCABULARY if Path(path).is_dir() else Path(path)
        try:
            vocabulary = file.read_text(encoding="utf-8")
            configs = [file.with_name(name) for name in _CONFIGS]
            ends = [_end(json.loads(config.read_text(encoding="utf-8"))) for config in configs if config.is_file()]
        except (OSError, ValueError, AttributeError) as error:
            valid = f"must be a directory with a {VOCABULARY}, or that file ({error})"
            raise ConfigError(Problem(field, str(path), valid)) from None
        return cls(vocabulary, next(filter(None, ends), None), field=field, source=str(path))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; what spells a special token is text like any other."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens included."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


class TiktokenTokenizer:
    """A tiktoken `encoding`, which must have `<|endoftext|>`; `ConfigError` about `field` otherwise."""

    def __init__(self, encoding: tiktoken.Encoding, *, field: str = "tokenizer") -> None:
        if SEPARATOR not in encoding.special_tokens_set:
            name = TIKTOKEN + encoding.name
            raise ConfigError(Problem(field, name, f"must have the token {SEPARATOR}, to separate documents with"))
        self._encoding = encoding
        # tiktoken has no public names for these three, which an encoding consists of.
        self.pattern: str = encoding._pat_str
        self.ranks: dict[bytes, int] = encoding._mergeable_ranks
        self.special_tokens: dict[str, int] = encoding._special_tokens
        self._known = {*self.ranks.values(), *self.special_tokens.values()}
        self.eod: int = encoding.eot_token
        self.vocab_size: int = encoding.n_vocab
        content = (self.pattern, sorted(self.special_tokens.items()), sorted(self.ranks.items()))
        self.sha256 = hashlib.sha256(repr(content).encode()).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._encoding,)

    @classmethod
    def load(cls, name: str, *, field: str = "tokenizer") -> TiktokenTokenizer:
        """The encoding of `tiktoken:NAME`. tiktoken downloads it once, to where TIKTOKEN_CACHE_DIR says."""
        try:
            import tiktoken
        except ImportError:
            raise ConfigError(_needs(field, name, "tiktoken", "tiktoken")) from None
        encoding, known = name.removeprefix(TIKTOKEN), tiktoken.list_encoding_names()
        if encoding not in known:
            raise ConfigError(Problem(field, name, f"must be {TIKTOKEN} and one of {', '.join(sorted(known))}"))
        try:
            loaded = tiktoken.get_encoding(encoding)
        except (OSError, ValueError) as error:
            valid = f"could not be read ({error}); where there is no network, TIKTOKEN_CACHE_DIR must name its cache"
            raise ConfigError(Problem(field, name, valid)) from None
        return cls(loaded, field=field)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; what spells a special token is text like any other."""
        return self._encoding.encode_ordinary(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens included; an id that no token has, of which there are some, is none."""
        return self._encoding.decode([index for index in ids if index in self._known])


def _end(config: Mapping[str, Any]) -> str | None:
    token = config.get("eos_token")
    return token.get("content") if isinstance(token, dict) else token


def _needs(field: str, value: str, package: str, extra: str) -> Problem:
    return Problem(field, value, f"needs {package}: pip install 'megatron-tied[{extra}]'")
