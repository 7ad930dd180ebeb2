"""Each tokenizer against its own library."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import tiktoken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiktoken import registry
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from megatron_tied.data.adapters import HuggingFaceTokenizer, TiktokenTokenizer, load_tokenizer, vocabulary_file
from megatron_tied.data.tokenizer import SEPARATOR, SentencePieceTokenizer
from megatron_tied.errors import ConfigError
from tests.data.corpus import make_text
from tests.data.hf import encoding, hf_directory

TEXT = make_text(500) + f" naïve 漢字 🙂\t12345\n\n {SEPARATOR}"
SMALL = TiktokenTokenizer(encoding())
anything = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_directory(tmp_path_factory.mktemp("hf") / "tokenizer")


def test_hugging_face_ids_are_those_of_transformers(directory: Path) -> None:
    theirs = PreTrainedTokenizerFast.from_pretrained(directory, split_special_tokens=True)
    for name in (directory, directory / "tokenizer.json"):
        ours = load_tokenizer(name)
        assert ours.encode(TEXT) == theirs(TEXT, add_special_tokens=False, truncation=False)["input_ids"]
        assert len(ours.encode(TEXT)) > 500  # the file says to truncate
        assert ours.decode(ours.encode(TEXT)) == TEXT
        assert (ours.eod, ours.vocab_size) == (theirs.eos_token_id, len(theirs))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(anything)
def test_tiktoken_ids_are_those_of_tiktoken(text: str) -> None:
    assert SMALL.encode(text) == encoding().encode(text, disallowed_special=())
    assert SMALL.decode(SMALL.encode(text)) == text


def test_a_tiktoken_vocabulary_has_gaps() -> None:
    assert (SMALL.eod, SMALL.vocab_size) == (267, 272)
    assert SMALL.decode([*SMALL.encode("and"), 266, 269, SMALL.eod]) == f"and{SEPARATOR}"


def test_the_name_of_an_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.ENCODINGS, "small", encoding())
    tiktoken.list_encoding_names()
    monkeypatch.setitem(registry.ENCODING_CONSTRUCTORS, "small", None)
    loaded = load_tokenizer("tiktoken:small")
    assert loaded.sha256 == SMALL.sha256
    assert vocabulary_file("tiktoken:small") is None


def test_no_text_spells_a_separator(directory: Path) -> None:
    for tokenizer in (SMALL, load_tokenizer(directory)):
        assert tokenizer.eod not in tokenizer.encode(TEXT)


def test_they_are_the_same_in_another_process(directory: Path, model: Path) -> None:
    for tokenizer in (SMALL, load_tokenizer(directory), load_tokenizer(model)):
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert (copy.encode(TEXT), copy.eod, copy.sha256) == (tokenizer.encode(TEXT), tokenizer.eod, tokenizer.sha256)


def test_a_fingerprint_is_of_all_that_decides_about_ids(directory: Path) -> None:
    found = {SMALL.sha256, load_tokenizer(directory).sha256}
    special_tokens = dict(SMALL.special_tokens)
    for changed in (
        {"pat_str": r"\s+|\S+"},
        {"mergeable_ranks": SMALL.ranks | {b"er": len(SMALL.ranks)}},
        {"special_tokens": special_tokens | {SEPARATOR: 268}},
    ):
        made = {"pat_str": SMALL.pattern, "mergeable_ranks": SMALL.ranks, "special_tokens": special_tokens} | changed
        found.add(TiktokenTokenizer(tiktoken.Encoding("small", **made)).sha256)
    vocabulary = (directory / "tokenizer.json").read_text()
    found.add(HuggingFaceTokenizer(vocabulary.replace(SEPARATOR, "</s>"), "</s>").sha256)
    found.add(HuggingFaceTokenizer(vocabulary.replace(SEPARATOR, "</s>"), "the").sha256)
    assert len(found) == 7
    assert TiktokenTokenizer(encoding("other name")).sha256 == SMALL.sha256


def test_documents_end_with_the_eos_token_where_there_is_no_separator(tmp_path: Path) -> None:
    path = hf_directory(tmp_path / "x", end="</s>")
    assert load_tokenizer(path).eod == Tokenizer.from_file(str(path / "tokenizer.json")).token_to_id("</s>")
    (path / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match=r"must have the token <\|endoftext\|>, or an eos_token"):
        load_tokenizer(path)


def test_a_sentencepiece_model_is_the_default(model: Path) -> None:
    assert isinstance(load_tokenizer(model), SentencePieceTokenizer)
    assert vocabulary_file(model) == model


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.tokenizer = '.*': must be a directory with a tokenizer.json"):
        load_tokenizer(tmp_path, field="data.tokenizer")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"must be a tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"must be a directory with a tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"'tiktoken:none': must be tiktoken: and one of .*cl100k_base"):
        load_tokenizer("tiktoken:none")
    without = tiktoken.Encoding("x", pat_str=r"\S+", mergeable_ranks=SMALL.ranks, special_tokens={})
    with pytest.raises(ConfigError, match=r"'tiktoken:x': must have the token <\|endoftext\|>"):
        TiktokenTokenizer(without)


def test_a_cache_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(ConfigError, match=r"could not be read \(no network\).*TIKTOKEN_CACHE_DIR"):
        load_tokenizer("tiktoken:cl100k_base")


@pytest.mark.parametrize(("package", "extra"), [("tokenizers", "hf"), ("tiktoken", "tiktoken")])
def test_a_library_that_is_not_installed(
    directory: Path, monkeypatch: pytest.MonkeyPatch, package: str, extra: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    name = directory if package == "tokenizers" else "tiktoken:cl100k_base"
    with pytest.raises(ConfigError, match=rf"needs {package}: pip install 'megatron-tied\[{extra}\]'"):
        load_tokenizer(name)
