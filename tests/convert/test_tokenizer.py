"""Tokenizers travel with their models, and SentencePiece's ids are those that transformers gives."""

from __future__ import annotations

import io
import random
import sys
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from tiktoken import registry
from transformers import AutoTokenizer

from megatron_tied.cli.main import main
from megatron_tied.convert.tokenizer import put_tokenizer, tokenizer_files
from megatron_tied.data.tokenizer import SentencePieceTokenizer, train_tokenizer
from megatron_tied.errors import ConfigError
from tests.convert.hf_models import convert, save
from tests.data.corpus import make_text
from tests.data.hf import encoding

ALPHABET = "  \n\tabab--==__ab  xé漢🙂\u2581\u00a0019<|endoftext|>"


def trained(options: dict[str, object], texts: list[str]) -> bytes:
    """A SentencePiece model that our own training would not make."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=200, minloglevel=2, **options
    )
    return model.getvalue()


@pytest.mark.parametrize("own", [True, False])
def test_ids_are_sentencepieces(own: bool, tmp_path: Path) -> None:
    texts = [make_text(400, seed) for seed in range(20)] + [Path(__file__).read_text()]
    other = {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    # The other one has a space put before the text, and no bytes for unknown characters.
    model = train_tokenizer(texts, 600).model if own else trained(other, texts)
    (tmp_path / "m.model").write_bytes(model)
    (tmp_path / "hf").mkdir()
    special = put_tokenizer(tmp_path / "m.model", tmp_path / "hf")
    ours, theirs = SentencePieceTokenizer(model), AutoTokenizer.from_pretrained(tmp_path / "hf")
    generator = random.Random(0)
    drawn = ["".join(generator.choices(ALPHABET, k=generator.randint(1, 80))) for _ in range(500)]
    for text in (*texts, *drawn):
        assert theirs(text)["input_ids"] == ours.encode(text), text
        # What is unknown, of which the first has nothing, is decoded to another sign by either.
        assert not own or theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))
    assert special["eos_token_id"] == theirs.eos_token_id == ours.eod
    assert len(theirs) == ours.vocab_size


def test_ids_are_tiktokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.ENCODINGS, "small", encoding())
    tiktoken.list_encoding_names()
    monkeypatch.setitem(registry.ENCODING_CONSTRUCTORS, "small", None)
    special = put_tokenizer(Path("tiktoken:small"), tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    generator = random.Random(0)
    drawn = ["".join(generator.choices(ALPHABET + "1234", k=generator.randint(1, 80))) for _ in range(500)]
    for text in (Path(__file__).read_text(), make_text(400), *drawn):
        assert theirs(text)["input_ids"] == encoding().encode(text, disallowed_special=())
        assert theirs.decode(theirs(text)["input_ids"]) == text
    assert special["eos_token_id"] == theirs.eos_token_id == encoding().eot_token
    assert len(theirs) == encoding().n_vocab


def test_a_model_that_normalises_or_is_no_bpe_is_refused(tmp_path: Path) -> None:
    texts = [make_text(400, seed) for seed in range(20)]
    for options, reason in (
        ({"model_type": "unigram", "hard_vocab_limit": False}, "is no BPE model"),
        ({"model_type": "bpe", "normalization_rule_name": "nmt_nfkc"}, "normalises its text"),
    ):
        (tmp_path / "m.model").write_bytes(trained(options, texts))
        with pytest.raises(ConfigError, match=reason):
            put_tokenizer(tmp_path / "m.model", tmp_path)


def test_without_tokenizers_none_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.model").write_bytes(train_tokenizer([make_text(400)], 300).model)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"needs tokenizers .*pip install .*--tokenizer none"):
        put_tokenizer(tmp_path / "m.model", tmp_path)


def test_a_hugging_face_tokenizer_comes_back_unchanged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = save("olmoe", tmp_path / "original", vocab_size=400)
    (tmp_path / "m.model").write_bytes(train_tokenizer([make_text(900, seed) for seed in range(20)], 400).model)
    put_tokenizer(tmp_path / "m.model", original)
    (original / "chat_template.jinja").write_text("{{ messages }}")
    (original / "README.md").write_text("not a tokenizer's")
    imported = convert("hf", "megatron-tied", original, tmp_path / "imported", "--no-verify")
    retied = ("--tie-group-size", "2", "--no-verify")
    tied = convert("megatron-tied", "megatron-tied", imported, tmp_path / "tied", *retied)
    exported = tmp_path / "exported"
    assert (
        main(["convert", "--from", "megatron-tied", "--to", "hf", "--input", str(tied), "--output", str(exported)]) == 0
    )
    names = {path.name for path in tokenizer_files(exported)}
    assert names == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for name in (*names, "generation_config.json"):
        assert (exported / name).read_bytes() == (original / name).read_bytes(), name
    assert not (exported / "README.md").exists()
    # A tokenizer.json stands for its directory.
    given = ("--no-verify", "--tokenizer", str(original / "tokenizer.json"))
    convert("megatron-tied", "hf", tied, tmp_path / "given", *given)
    assert {path.name for path in tokenizer_files(tmp_path / "given")} == names
    # Of a compact model it needs none of the code that is written beside it.
    compact = convert("megatron-tied", "hf-compact", tied, tmp_path / "compact", *given)
    theirs, ours = (AutoTokenizer.from_pretrained(it, trust_remote_code=False) for it in (original, compact))
    assert ours.encode("a text") == theirs.encode("a text")
