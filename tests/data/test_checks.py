from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_tied.data import checks as room
from megatron_tied.data import metadata as metadata_room
from megatron_tied.data.checks import Blend, check_data, parse_blend, parse_split
from megatron_tied.data.metadata import Index, Metadata
from megatron_tied.data.tokenizer import train_tokenizer
from megatron_tied.errors import ConfigError
from megatron_tied.platform import prepare
from tests.data.corpus import make_text
from tests.data.hf import hf_directory

MakeData = Callable[..., Path]
TEXTS = [make_text(100, seed) for seed in range(10)]


def problems(train: Any, **changes: Any) -> list[str]:
    arguments = {"validation": None, "split": None, "tokenizer": None, "cache_dir": None}
    arguments |= {"vocab_size": 320, "seq_length": 64, "evaluates": True}
    return [str(problem) for problem in check_data(train=train, **arguments | changes)]


def foreign(prefix: Path, documents: Sequence[Sequence[int]], dtype: type = np.int32) -> Path:
    """A data set as Megatron's own tools write it."""
    prepare()
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        builder.add_document(np.array(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_sound_data(data_set: MakeData, model: Path) -> None:
    a, b = data_set("a", TEXTS), data_set("b", TEXTS)
    assert problems(a) == []
    assert problems(str(a), validation=[1, a, 3, str(b)], tokenizer=model) == []
    assert problems([0.75, a, 0.25, b], split="80,20") == []


@pytest.mark.parametrize(
    ("blend", "complaint"),
    [
        ([], "must be a prefix or a list of pairs"),
        (["A"], "must be a prefix or a list of pairs"),
        ([0.5, "A", "B"], "must be a prefix or a list of pairs"),
        (["A", "B"], "'A': .* a weight must be a number > 0"),
        ([0, "A"], "0: .* a weight must be a number > 0"),
        ([-1.0, "A"], "-1.0: .* a weight must be"),
        ([math.nan, "A"], "nan: .* a weight must be"),
        ([math.inf, "A"], "inf: .* a weight must be"),
        ([True, "A"], "True: .* a weight must be"),
        ([0.5, 0.5], "0.5: .* a prefix must be a path"),
    ],
)
def test_malformed_blends(blend: list[object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=rf"^data.validation = .*{complaint}"):
        parse_blend(blend, "data.validation")


def test_blends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_blend("a", "data.train") == Blend((tmp_path / "a",), None)
    assert parse_blend([2, "a"], "data.train") == Blend((tmp_path / "a",), None)
    assert parse_blend((3, "a", 1.0, Path("b")), "data.train") == Blend((tmp_path / "a", tmp_path / "b"), (3.0, 1.0))


def test_splits() -> None:
    assert parse_split("98,2,0") == ((0.0, 0.98), (0.98, 1.0))
    assert parse_split("3,1") == ((0.0, 0.75), (0.75, 1.0))
    assert parse_split("1") == ((0.0, 1.0), (1.0, 1.0))
    assert parse_split("2,1,1") == ((0.0, 0.5), (0.5, 0.75))
    assert parse_split(None) == ((0.0, 1.0), (1.0, 1.0))


@pytest.mark.parametrize("split", ["", "a,b", "0,1", "1,-1", "1,nan", "1,inf", "1,1,1,1"])
def test_malformed_splits(data_set: MakeData, split: str) -> None:
    (problem,) = problems(data_set("a", TEXTS), split=split)
    assert problem.startswith(f"data.split = {split!r}: must be up to three numbers")


def test_a_split_beside_validation_data(data_set: MakeData) -> None:
    a = data_set("a", TEXTS)
    assert problems(a, validation=a, split="98,2") == [
        "data.split = '98,2': must be left out when data.validation is given"
    ]


def test_every_missing_file_is_named(data_set: MakeData, tmp_path: Path) -> None:
    a = data_set("a", TEXTS)
    (tmp_path / "a.idx").unlink()
    assert problems(a, validation=[1, tmp_path / "none", 1, f"{a}.bin"]) == [
        f"data.train = '{a}': needs the file {a}.idx",
        f"data.validation = '{tmp_path}/none': needs the file {tmp_path}/none.bin",
        f"data.validation = '{tmp_path}/none': needs the file {tmp_path}/none.idx",
        f"data.validation = '{a}.bin': needs the file {a}.bin.bin; give the prefix, without .bin",
        f"data.validation = '{a}.bin': needs the file {a}.bin.idx; give the prefix, without .bin",
    ]


@pytest.mark.parametrize(
    ("suffix", "damage", "complaint"),
    [
        (".bin", lambda data: data[:-2], "a.idx promises"),
        (".idx", lambda data: data[:-1], "a.idx is truncated"),
        (".idx", lambda data: data[:20], "a.idx is not the index"),
        (".idx", lambda data: b"x" + data[1:], "a.idx is not the index"),
        (".idx", lambda data: data[:17] + b"\x07" + data[18:], "a.idx has version 1 and type code 7"),
        (".json", lambda data: data[:-5], "a.json is no metadata"),
        (".json", lambda data: b"{}", "a.json is no metadata"),
        (".json", lambda data: data.replace(b"data 1", b"data 9"), "a.json has format 'megatron-tied data 9'"),
        (".json", lambda data: data.replace(b'"tokens": ', b'"tokens": 1'), "a.json tells of 1"),
    ],
)
def test_damaged_files(data_set: MakeData, suffix: str, damage: Callable[[bytes], bytes], complaint: str) -> None:
    a = data_set("a", TEXTS)
    path = a.with_name(f"a{suffix}")
    path.write_bytes(damage(path.read_bytes()))
    (problem,) = problems(a)
    assert problem.startswith(f"data.train = '{a}': ")
    assert complaint in problem


def test_a_vocabulary_smaller_than_the_ids(data_set: MakeData) -> None:
    a = data_set("a", TEXTS)
    largest = Metadata.read(a).max_token_id
    assert problems(a, vocab_size=largest + 1) == []
    assert problems(a, vocab_size=largest) == [
        f"model.vocab_size = {largest}: must be >= {largest + 1}: {a} holds token id {largest}"
    ]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_the_ids_of_a_foreign_data_set_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: type) -> None:
    monkeypatch.setattr(metadata_room, "_SCAN_TOKENS", 7)
    ids = [[5] * 40, [50_000, *[5] * 40]]
    prefix = foreign(tmp_path / "a", ids, dtype)
    complaint = f"model.vocab_size = 50000: must be >= 50001: {prefix} holds token id 50000"
    assert problems(prefix, vocab_size=50_000) == [complaint]
    assert problems(prefix, vocab_size=50_001) == []


def test_the_ids_of_a_foreign_data_set_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = foreign(tmp_path / "a", [[5] * 90])
    assert problems(prefix, vocab_size=6) == []
    calls = []
    monkeypatch.setattr(room, "largest_token_id", lambda *arguments: calls.append(arguments) or 900)
    assert problems(prefix, vocab_size=6) == []
    assert calls == []
    foreign(prefix, [[900] * 91])
    assert len(problems(prefix, vocab_size=6)) == 1
    assert len(calls) == 1


def test_a_sequence_longer_than_the_data(data_set: MakeData) -> None:
    a = data_set("a", TEXTS)
    tokens = Index.read(a).tokens
    assert problems(a, seq_length=tokens - 1) == []
    assert problems(a, seq_length=tokens) == [
        f"train.seq_length = {tokens}: must be <= {tokens - 1}: data.train has only {tokens} tokens of {a}"
    ]


def test_a_sequence_longer_than_a_part_of_the_data(data_set: MakeData) -> None:
    a, b = data_set("a", TEXTS), data_set("b", TEXTS[:1])
    lengths = Index.read(a).lengths
    held_out = int(lengths[-2:].sum())
    assert problems(a, split="80,20", seq_length=held_out - 1) == []
    (problem,) = problems(a, split="80,20", seq_length=held_out)
    assert f"must be <= {held_out - 1}: data.validation has only {held_out} tokens" in problem
    (problem,) = problems(a, validation=b, seq_length=1000)
    assert f"data.validation has only {Index.read(b).tokens} tokens of {b}" in problem


def test_a_split_without_a_document_for_validation(data_set: MakeData) -> None:
    a = data_set("a", TEXTS)
    assert problems(a, split="98,2,0") == [
        f"data.split = '98,2,0': leaves none of the 10 documents of {a} for data.validation"
    ]
    assert problems(a, split="98,0,2") == []
    assert problems(a, split="98,2,0", evaluates=False) == []


def test_an_empty_foreign_data_set(tmp_path: Path) -> None:
    (problem,) = problems(foreign(tmp_path / "a", []))
    assert "must be <= 0: data.train has only 0 tokens" in problem


def test_the_tokenizer_must_be_the_one_of_the_data(data_set: MakeData, tmp_path: Path) -> None:
    a = data_set("a", TEXTS)
    other = tmp_path / "other.model"
    other.write_bytes(train_tokenizer(TEXTS, 310).model)
    assert problems(a, tokenizer=tmp_path / "none.model")[0].startswith(
        f"data.tokenizer = '{tmp_path}/none.model': must be a SentencePiece model"
    )
    (problem,) = problems(a, tokenizer=other)
    assert problem.startswith(f"data.tokenizer = '{other}': must be the tokenizer that made {a} (")
    b = data_set("b", TEXTS, tokenizer=other)
    assert problems(a, validation=b) == [f"data.validation = '{b}': must have been made with the same tokenizer as {a}"]


def test_a_tokenizer_of_another_library_is_told_from_the_others(data_set: MakeData, tmp_path: Path) -> None:
    directory = hf_directory(tmp_path / "hf")
    a = data_set("a", TEXTS, tokenizer=directory)
    for name in (directory, directory / "tokenizer.json"):
        assert problems(a, tokenizer=name, vocab_size=400) == []
    other = hf_directory(tmp_path / "other", end="</s>")
    (problem,) = problems(a, tokenizer=other, vocab_size=400)
    assert problem.startswith(f"data.tokenizer = '{other}': must be the tokenizer that made {a} (hf, sha256 ")


def test_the_tokenizer_must_know_the_ids_of_a_foreign_data_set(tmp_path: Path, model: Path) -> None:
    prefix = foreign(tmp_path / "a", [[320] * 90])
    assert problems(prefix, tokenizer=model, vocab_size=400) == [
        f"data.tokenizer = '{model}': has 320 tokens, but {prefix} holds token id 320"
    ]
    assert problems(foreign(tmp_path / "b", [[319] * 90]), tokenizer=model) == []


def test_a_cache_directory_that_cannot_be(data_set: MakeData, tmp_path: Path) -> None:
    a = data_set("a", TEXTS)
    assert problems(a, cache_dir=tmp_path / "new" / "cache") == []
    assert problems(a, cache_dir=f"{a}.json/cache") == [
        f"data.cache_dir = '{a}.json/cache': must be a directory that can be written; set data.cache_dir to one"
    ]


def test_several_problems_at_once(data_set: MakeData, tmp_path: Path) -> None:
    found = problems(data_set("a", TEXTS), validation=tmp_path / "none", vocab_size=5, seq_length=10**6)
    assert [problem.split(" = ")[0] for problem in found] == [
        "train.seq_length",
        "data.validation",
        "data.validation",
        "model.vocab_size",
    ]


def test_metadata_is_plain_json(data_set: MakeData) -> None:
    content = json.loads(data_set("a", TEXTS).with_name("a.json").read_text())
    assert content["format"] == "megatron-tied data 1"
    assert content["documents"] == 10
