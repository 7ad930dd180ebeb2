"""The tokenizer that belongs to a model: its files are carried along, or made of what SentencePiece or tiktoken has."""

from __future__ import annotations

import base64
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec  # type: ignore[attr-defined]  # made by protobuf

from megatron_tied.convert.hf_files import read_json
from megatron_tied.convert.hf_output import write_json
from megatron_tied.data.adapters import TiktokenTokenizer, Tokenizer, is_tiktoken
from megatron_tied.data.tokenizer import SEPARATOR, SentencePieceTokenizer
from megatron_tied.errors import ConfigError, Problem

if TYPE_CHECKING:
    import tokenizers

# Files of a Hugging Face directory that tokenizers consist of; a model needs one of the first group.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model", "spiece.model")
_BESIDE = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)
_CONFIG = "tokenizer_config.json"
NO_TOKENIZER = "none"

_UNDERSCORE = "\u2581"  # SentencePiece's mark for a space
_Piece = ModelProto.SentencePiece

# The keys of config.json that name tokens.
Special = dict[str, int | None]
NO_TOKENS: Special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def tokenizer_files(directory: Path) -> list[Path]:
    """The tokenizer's files in a Hugging Face directory; none if it has no vocabulary."""
    if not any((directory / name).is_file() for name in _VOCABULARIES):
        return []
    return [directory / name for name in (*_VOCABULARIES, *_BESIDE) if (directory / name).is_file()]


def checked(given: Path, vocab_size: int, *, field: str) -> Special:
    """The special tokens of the tokenizer `given`, a directory, a SentencePiece model or a tiktoken encoding.

    Raises `ConfigError` about `field` for what is no tokenizer, or has tokens that a model of `vocab_size` does not
    know, or has no equal in Hugging Face's form.
    """
    if given.is_dir():
        ids = _ids(given, field)
        special = _special(given, ids, field)
    else:
        with tempfile.TemporaryDirectory() as directory:
            special = put_tokenizer(given, Path(directory))
            ids = _ids(Path(directory), field)
    token = max(ids, key=ids.__getitem__, default=None)
    if token is not None and ids[token] >= vocab_size:
        valid = f"has token id {ids[token]} ({token[:40]!r}), and the model knows those below {vocab_size}"
        raise ConfigError(Problem(field, str(given), f"{valid}: name another by --tokenizer, or {NO_TOKENIZER}"))
    return special


def put_tokenizer(given: Path, directory: Path) -> Special:
    """Put the tokenizer `given`, a directory, a SentencePiece model or a tiktoken encoding, into `directory`.

    Returns what the latter two say of the special tokens; nothing for a directory. Raises `ConfigError` for one that
    has no equal in Hugging Face's form.
    """
    if is_tiktoken(given):
        return _write_tiktoken(str(given), directory)
    if not given.is_dir():
        return _write_sentencepiece(given, directory)
    for file in tokenizer_files(given):
        content = read_json(file) if file.name == _CONFIG else {}
        if "auto_map" in content:
            # It names code, which is not carried along.
            del content["auto_map"]
            write_json(directory / file.name, content)
        else:
            shutil.copyfile(file, directory / file.name)
    return {}


def _ids(directory: Path, field: str) -> dict[str, int]:
    """Every token's id, in whichever form they are there; none where that form is not known here."""
    found = {path.name: path for path in tokenizer_files(directory)}
    if not found:
        valid = f"must hold a tokenizer: one of {', '.join(_VOCABULARIES)}"
        raise ConfigError(Problem(field, str(directory), valid))
    first = next(iter(found.values()))
    try:
        ids = _ids_of_file(first)
        if first.name != "tokenizer.json" and "added_tokens.json" in found:
            ids |= read_json(found["added_tokens.json"], field)
        if not all(isinstance(index, int) for index in ids.values()):
            raise ValueError("a token has an id that is no integer")
    except ConfigError:
        raise
    except Exception as error:  # tokenizers has no narrower one
        raise ConfigError(Problem(field, str(first), f"is no tokenizer: {error}")) from None
    return ids


def _ids_of_file(file: Path) -> dict[str, int]:
    if file.name == "tokenizer.json":
        import tokenizers

        return tokenizers.Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    if file.name in ("tokenizer.model", "spiece.model"):
        model = sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())
        return {model.id_to_piece(index): index for index in range(model.piece_size())}
    if file.name == "vocab.json":
        return read_json(file)
    if file.name == "vocab.txt":
        return {token: index for index, token in enumerate(file.read_text(encoding="utf-8").splitlines())}
    return {}


def _special(directory: Path, ids: Mapping[str, int], field: str) -> Special:
    """The ids of the tokens that its config files name."""
    named: dict[str, Any] = {}
    for name in ("special_tokens_map.json", _CONFIG):
        if (directory / name).is_file():
            named |= read_json(directory / name, field)
    tokens = {key: named.get(key.removesuffix("_id")) for key in NO_TOKENS}
    contents = {key: token.get("content") if isinstance(token, dict) else token for key, token in tokens.items()}
    return {key: ids.get(content) if isinstance(content, str) else None for key, content in contents.items()}


def _write_sentencepiece(model_file: Path, directory: Path) -> Special:
    """tokenizer.json and its config, by which transformers gives the ids that SentencePiece gives."""
    try:
        import tokenizers
        from tokenizers import decoders, models, normalizers
    except ImportError:
        valid = "needs tokenizers to go with a Hugging Face model: pip install 'tokenizers>=0.22', or --tokenizer none"
        raise ConfigError(Problem("--tokenizer", str(model_file), valid)) from None

    ours = SentencePieceTokenizer.load(model_file, field="--tokenizer")
    proto = ModelProto.FromString(ours.model)
    if reason := _not_expressible(proto):
        valid = f"{reason}: give --tokenizer DIR with a Hugging Face tokenizer of the same ids, or --tokenizer none"
        raise ConfigError(Problem("--tokenizer", str(model_file), valid))
    pieces = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    unknown = proto.pieces[proto.trainer_spec.unk_id].piece
    has_bytes = any(piece.type == _Piece.BYTE for piece in proto.pieces)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(pieces, list(_merges(proto)), unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes)
    )
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", _UNDERSCORE)]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.insert(0, normalizers.Prepend(_UNDERSCORE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    parts = [decoders.Replace(_UNDERSCORE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        parts.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(parts)
    end = proto.pieces[ours.eod].piece
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(piece, special=True, normalized=False) for piece in dict.fromkeys((end, unknown))]
    )
    _save(tokenizer, directory, {"eos_token": end, "unk_token": unknown})
    _compare(ours, directory, model_file)
    return {"bos_token_id": ours.bos, "eos_token_id": ours.eod, "pad_token_id": None}


def _write_tiktoken(name: str, directory: Path) -> Special:
    """The same for a tiktoken encoding, by transformers' converter."""
    try:
        from transformers.convert_slow_tokenizer import TikTokenConverter
    except ImportError:
        valid = "needs transformers: pip install 'megatron-tied[hf]'"
        raise ConfigError(Problem("--tokenizer", name, valid)) from None
    ours = TiktokenTokenizer.load(name, field="--tokenizer")
    ranks, special = ours.ranks, {index: token for token, index in ours.special_tokens.items()}
    # The converter numbers the special tokens without gaps.
    added = [special.get(index, f"<|unused_{index}|>") for index in range(max(ranks.values()) + 1, ours.vocab_size)]
    # A possessive {m,n}+ is something else in the regular expressions of tokenizers.
    pattern = re.sub(r"(\{\d+,\d+\})\+", r"\1", ours.pattern)
    with tempfile.NamedTemporaryFile() as file:
        file.writelines(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())
        file.flush()
        converter = TikTokenConverter(vocab_file=file.name, pattern=pattern, extra_special_tokens=added)
        _save(converter.converted(), directory, {"eos_token": SEPARATOR})
    _compare(ours, directory, name)
    return {"bos_token_id": None, "eos_token_id": ours.eod, "pad_token_id": None}


def _save(tokenizer: tokenizers.Tokenizer, directory: Path, tokens: dict[str, str]) -> None:
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(
        directory / _CONFIG,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **tokens,
            "clean_up_tokenization_spaces": False,
            # No document can spell a control piece.
            "split_special_tokens": True,
        },
    )


def _not_expressible(proto: ModelProto) -> str | None:
    normalizer = proto.normalizer_spec
    if proto.trainer_spec.model_type != TrainerSpec.BPE:
        return "is no BPE model"
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        return "normalises its text"
    if any(piece.type in (_Piece.USER_DEFINED, _Piece.UNUSED) for piece in proto.pieces):
        return "has pieces that the user defined, or unused ones"
    return None


def _merges(proto: ModelProto) -> Iterator[tuple[str, str]]:
    """Pairs in the order in which SentencePiece merges them: by the score of what they give."""
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == _Piece.NORMAL}
    for piece, _ in sorted(normal.items(), key=lambda item: -item[1]):
        for cut in range(1, len(piece)):
            if piece[:cut] in normal and piece[cut:] in normal:
                yield piece[:cut], piece[cut:]


def _compare(ours: Tokenizer, directory: Path, name: str | Path) -> None:
    """Raise `ConfigError` if the two sides tell another story of a sample of text."""
    import tokenizers

    theirs = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    theirs.encode_special_tokens = True
    for text in _sample(ours):
        if theirs.encode(text, add_special_tokens=False).ids != ours.encode(text):
            valid = f"gives other ids than its tokenizer.json for {text[:60]!r}: give --tokenizer DIR in its place"
            raise ConfigError(Problem("--tokenizer", str(name), valid))


def _sample(ours: Tokenizer) -> Iterator[str]:
    """Text with every piece in it, and what tokenizers have trouble with."""
    pieces = [ours.decode([index]) for index in range(ours.vocab_size)]
    for start in range(0, len(pieces), 256):
        yield "".join(pieces[start : start + 256])
        yield " ".join(reversed(pieces[start : start + 256]))
    yield f"  two spaces,\ttab\n\n    def f(x):\n        return x == 0x1F{SEPARATOR}\r\n ----======____   \n"
    yield "naïve Ελληνικά 漢字かな 한국어 🙂🏳️‍🌈 <0x0A> ½ ﬁ \u00a0\u200b 1234567890 aaaaaaaaaaaaa"
