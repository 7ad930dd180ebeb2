"""Text that comes token by token, by each kind of tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from megatron_tied.data.adapters import HuggingFaceTokenizer, TiktokenTokenizer, Tokenizer
from megatron_tied.data.tokenizer import SentencePieceTokenizer, train_tokenizer
from megatron_tied.inference.text_stream import TextStream
from tests.data.corpus import make_text
from tests.data.hf import encoding, hf_directory

PROMPT = "the café"
REST = " of naïve 日本語 🙂🙂 and\n  the owner, 12 ñ\N{REPLACEMENT CHARACTER}. Ω the"


def of_llama(directory: Path) -> Tokenizer:
    """Like Llama's: a space that is not there begins each text, and no decoded text."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_text(3000).splitlines()),
        model_prefix=str(directory / "llama"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n"],
        minloglevel=2,
    )
    return SentencePieceTokenizer.load(directory / "llama.model")


TOKENIZERS: dict[str, Callable[[Path], Tokenizer]] = {
    "ours": lambda _: train_tokenizer([make_text(3000)], 400),
    "llama": of_llama,
    "hugging_face": lambda directory: HuggingFaceTokenizer.load(hf_directory(directory / "hf")),
    "tiktoken": lambda _: TiktokenTokenizer(encoding()),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    return TOKENIZERS[request.param](tmp_path)


def streamed(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> list[str]:
    stream = TextStream(tokenizer, prompt)
    return [stream.add(token) for token in tokens]


def test_all_text_comes_in_whole_characters_as_soon_as_it_is_known(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode(PROMPT)
    tokens = tokenizer.encode(PROMPT + REST)
    assert tokens[: len(prompt)] == prompt
    parts = streamed(tokenizer, prompt, tokens[len(prompt) :])
    assert "".join(parts) == REST
    assert parts.count("") < len(parts) / 2
    assert "🙂" in "|".join(parts)
    last = tokens.index(tokens[-1], len(prompt))
    assert parts[last - len(prompt)]


def test_half_a_character_is_not_told(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("bank 日本")
    whole = next(count for count in range(len(tokens)) if "日" in tokenizer.decode(tokens[:count]))
    for count in range(whole, len(tokens)):
        assert "".join(streamed(tokenizer, [], tokens[:count])) == "bank 日"
    assert "".join(streamed(tokenizer, [], tokens)) == "bank 日本"


def test_bytes_that_are_no_text_come_late_but_come(tokenizer: Tokenizer) -> None:
    """A model that has learned little writes them."""
    continuing = next(token for token in reversed(tokenizer.encode("日")))
    parts = streamed(tokenizer, tokenizer.encode("a"), [continuing] * 20)
    assert "".join(parts) == "\N{REPLACEMENT CHARACTER}" * 17
    tokens = [continuing] * 20 + tokenizer.encode("x")[-1:]
    assert "".join(streamed(tokenizer, tokenizer.encode("a"), tokens)) == "\N{REPLACEMENT CHARACTER}" * 20 + "x"
