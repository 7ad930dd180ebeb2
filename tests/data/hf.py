"""Small tokenizers of other libraries, and data sets with the columns of those on the hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import tiktoken
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_tied.data.tokenizer import SEPARATOR
from tests.data.corpus import make_text

# Like cl100k_base: digits by three, and ids between the special tokens that no token has.
PATTERN = r"[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s+"


def byte_bpe(end: str, vocab_size: int = 400) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([make_text(3000)], trainer)
    return tokenizer


def hf_directory(directory: Path, end: str = SEPARATOR) -> Path:
    directory.mkdir()
    tokenizer = byte_bpe(end)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"__type": "AddedToken", "content": end}})
    )
    return directory


def encoding(name: str = "small") -> tiktoken.Encoding:
    ranks = {bytes([byte]): byte for byte in range(256)}
    for token in (b"th", b" th", b"the", b" the", b"an", b"and", b" an", b" and", b"12", b"123"):
        ranks[token] = len(ranks)
    special_tokens = {SEPARATOR: len(ranks) + 1, "<|pad|>": len(ranks) + 5}
    return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special_tokens)


def finephrase(directory: Path, texts: Sequence[Sequence[str]]) -> Path:
    """Each of `texts` is a file; a row has the original text, and the rephrased ones nested in a list."""
    directory.mkdir(parents=True)
    for number, rows in enumerate(texts):
        columns = {
            "text": [f"original of {text}" for text in rows],
            "id": [f"{number}-{row}" for row in range(len(rows))],
            "rollout_results": [[{"text": text, "finish_reason": "stop"}] for text in rows],
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), directory / f"{number:03}.parquet", row_group_size=16)
    return directory


def dclm_edu(directory: Path, texts: Sequence[Sequence[str | None]]) -> Path:
    """Each of `texts` is a file."""
    directory.mkdir(parents=True)
    for number, rows in enumerate(texts):
        columns = {"text": rows, "url": ["https://a"] * len(rows), "edu_int_score": [3] * len(rows)}
        pyarrow.parquet.write_table(pyarrow.table(columns), directory / f"{number:03}.parquet", row_group_size=16)
    return directory
