from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from megatron_tied.data import tokenizer as room
from megatron_tied.data.tokenizer import SEPARATOR, SentencePieceTokenizer, train_tokenizer
from megatron_tied.errors import ConfigError
from tests.data.corpus import make_text

TEXT = make_text(5000)
SMALL = train_tokenizer([TEXT], 320)


def stock_model(**options: object) -> bytes:
    """A model as SentencePiece trains it by itself: dummy prefix, spaces removed, <s> and </s>."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        minloglevel=2,
        **{"model_type": "bpe", "vocab_size": 60, **options},
    )
    return model.getvalue()


def whole(tokenizer: SentencePieceTokenizer, text: str) -> list[int]:
    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model).encode(text)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_every_text_comes_back(text: str) -> None:
    assert SMALL.decode(SMALL.encode(text)) == text


def test_indentation_tabs_and_line_ends_come_back() -> None:
    text = "def f():\r\n\n\t    return  'x'   \n\n"
    assert SMALL.decode(SMALL.encode(text)) == text


def test_no_text_spells_the_separator() -> None:
    assert SMALL.eod not in SMALL.encode(f"a {SEPARATOR}{SEPARATOR} b")


def test_pieces_give_the_tokens_of_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_PIECE_CHARS", 16)
    text = "  \n\n" + TEXT
    assert len(list(SMALL._pieces(text))) > 500
    assert SMALL.encode(text) == whole(SMALL, text)


def test_a_model_that_marks_line_starts_is_not_cut_at_every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_PIECE_CHARS", 16)
    stock = SentencePieceTokenizer(stock_model())
    assert stock.encode(TEXT) == whole(stock, TEXT)


def test_a_model_with_line_ends_inside_pieces_is_not_cut_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_PIECE_CHARS", 16)
    stock = stock_model(
        user_defined_symbols=["\nt"],
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        byte_fallback=True,
        vocab_size=320,
    )
    joined = SentencePieceTokenizer(stock)
    assert joined.encode(TEXT) == whole(joined, TEXT)


def test_a_long_line_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_PIECE_CHARS", 16)
    monkeypatch.setattr(room, "_MAX_PIECE_CHARS", 64)
    line = "token " * 500
    assert max(map(len, SMALL._pieces(line))) <= 80
    assert SMALL.decode(SMALL.encode(line)) == line


def test_training_is_deterministic() -> None:
    assert train_tokenizer([TEXT], 320).model == SMALL.model
    assert SMALL.vocab_size == 320


@pytest.mark.parametrize(("asked", "relation"), [(8000, "<="), (10, ">=")])
def test_a_vocabulary_that_does_not_fit_the_text(asked: int, relation: str, capfd: pytest.CaptureFixture) -> None:
    sentencepiece.set_min_log_level(0)
    with pytest.raises(ConfigError, match=rf"--vocab-size = {asked}: must be {relation} \d+ for") as caught:
        train_tokenizer([TEXT], asked)
    possible = int(str(caught.value).split(relation)[1].split()[0])
    assert train_tokenizer([TEXT], possible).vocab_size == possible
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("texts", [[], [""], ["\n\n"]])
def test_training_on_nothing(texts: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"--input .* must hold text"):
        train_tokenizer(texts, 320)


def test_training_takes_no_more_text_than_allowed() -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield "bank layer\n" * 10

    train_tokenizer(endless(), 270, max_bytes=1000)
    assert taken == 11  # of 100 bytes each; the last is found to be too much


def test_training_keeps_long_lines() -> None:
    line = "zébrâ " * 4096  # cut into pieces of 4096 characters, longer than SentencePiece takes by default
    assert len(train_tokenizer([line], 275).encode(" zébrâ zébrâ")) == 2


def test_a_stock_model_ends_documents_with_its_end_of_sentence() -> None:
    stock = SentencePieceTokenizer(stock_model())
    assert (stock.bos, stock.eos, stock.eod) == (1, 2, 2)
    assert (SMALL.bos, SMALL.eos, SMALL.eod) == (None, None, 1)


def test_a_separator_is_preferred_to_an_end_of_sentence() -> None:
    both = SentencePieceTokenizer(stock_model(control_symbols=[SEPARATOR]))
    assert both.eod == 3


@pytest.mark.parametrize("content", [b"", b"junk"])
def test_a_file_that_is_no_model(tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "x.model").write_bytes(content)
    with pytest.raises(ConfigError, match=r"data.tokenizer = '.*x.model': must be a SentencePiece model"):
        SentencePieceTokenizer.load(tmp_path / "x.model", field="data.tokenizer")
    assert capfd.readouterr().err == ""


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        SentencePieceTokenizer.load(tmp_path / "x.model")


def test_a_model_without_a_separator() -> None:
    with pytest.raises(ConfigError, match="must define"):
        SentencePieceTokenizer(stock_model(eos_id=-1))
