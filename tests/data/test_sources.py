from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from megatron_tied.data import sources as room
from megatron_tied.data.sources import (
    Source,
    Tally,
    check_records,
    documents,
    find_sources,
    read_chunks,
    sample,
)
from megatron_tied.errors import ConfigError
from tests.data.corpus import make_text, write_jsonl

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def texts_of(path: Path, chunk_bytes: int = 1 << 20, tally: Tally | None = None) -> list[str]:
    tally = tally or Tally()
    chunks = read_chunks([Source(path)], chunk_bytes)
    return [text for chunk in chunks for text in documents(chunk, "text", tally)]


def test_a_directory_is_searched_in_order(tmp_path: Path) -> None:
    names = ["b/2.txt", "b/1.md.gz", "a.py", "c.jsonl.zst", "Z.TXT"]
    ignored = [".git/x.txt", "b/.hidden.txt", "data.json", "image.png", "noise.gz"]
    for name in names + ignored:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = [source.path.relative_to(tmp_path).as_posix() for source in find_sources([tmp_path])]
    assert found == ["Z.TXT", "a.py", "c.jsonl.zst", "b/1.md.gz", "b/2.txt"]


def test_the_order_is_not_the_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(3):
            (tmp_path / name / f"{number}.txt").touch()
    walk = os.walk

    def reversed_walk(*arguments: Any, **options: Any) -> Iterator[tuple[str, list[str], list[str]]]:
        for folder, directories, names in walk(*arguments, **options):
            directories.sort(reverse=True)
            yield folder, directories, sorted(names, reverse=True)

    monkeypatch.setattr(os, "walk", reversed_walk)
    paths = [source.path for source in find_sources([tmp_path])]
    assert len(paths) == 6
    assert paths == sorted(paths)


def test_a_file_that_is_named_is_read_whatever_its_suffix(tmp_path: Path) -> None:
    (tmp_path / ".notes.log").write_text("x")
    assert find_sources([tmp_path / ".notes.log", tmp_path / ".notes.log"]) == [Source(tmp_path / ".notes.log")] * 2


def test_all_bad_inputs_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as caught:
        find_sources([tmp_path / "none", tmp_path / "empty"])
    first, second = map(str, caught.value.problems)
    assert "none': must be an existing file" in first
    assert "empty': must hold at least one text file" in second


@pytest.mark.parametrize("suffix", COMPRESS)
def test_plain_and_compressed_files_give_the_same(tmp_path: Path, suffix: str) -> None:
    texts = [make_text(200, seed) for seed in range(20)]
    plain = write_jsonl(tmp_path / "plain.jsonl", texts).read_bytes()
    records, text = tmp_path / f"x.jsonl{suffix}", tmp_path / f"x.txt{suffix}"
    records.write_bytes(COMPRESS[suffix](plain))
    text.write_bytes(COMPRESS[suffix]("".join(texts).encode()))
    for path in (records, text):
        assert sum(chunk.disk_bytes for chunk in read_chunks([Source(path)], 1000)) == path.stat().st_size
    assert texts_of(records, 1000) == texts
    assert "".join(texts_of(text, 1000)) == "".join(texts)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.integers(1, 7))
def test_a_text_file_is_cut_between_characters(text: str, chunk_bytes: int) -> None:
    data = text.removeprefix("\ufeff").encode()
    tally = Tally()
    source = Source(Path("x.txt"))
    chunks = list(room._chunks_of(source, io.BytesIO(data), chunk_bytes))
    pieces = [piece for chunk in chunks for piece in documents(chunk, "text", tally)]
    assert "".join(pieces).encode() == data
    assert tally == Tally(text_bytes=len(data))
    assert [chunk.ends_document for chunk in chunks] == [False] * (len(chunks) - 1) + [True] * bool(chunks)


def test_pieces_of_a_text_file_are_of_bounded_size(tmp_path: Path) -> None:
    path = tmp_path / "one_line.txt"
    path.write_text("x" * 10_000)
    assert max(len(chunk.data) for chunk in read_chunks([Source(path)], 100)) <= 200


@pytest.mark.parametrize("chunk_bytes", [1, 10, 100])
def test_records_are_never_cut(tmp_path: Path, chunk_bytes: int) -> None:
    texts = [make_text(30, seed) for seed in range(5)]
    assert texts_of(write_jsonl(tmp_path / "x.jsonl", texts), chunk_bytes) == texts


def test_a_last_record_without_line_end_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('\n{"text": "a"}\r\n\n{"text": "b"}')
    tally = Tally()
    assert texts_of(path, tally=tally) == ["a", "b"]
    assert tally.skipped == 0


def test_records_without_text_are_counted_and_the_first_is_located(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = ['{"text": "a"}', "", '{"text": 1}', "{", '["text"]', '{"other": "x"}', '{"text": "b"}', "[" * 5000]
    path.write_text("\n".join(lines))
    tally = Tally()
    assert texts_of(path, 20, tally) == ["a", "b"]
    assert (tally.skipped, tally.first_skipped) == (5, f"{path}:3")


def test_bytes_that_are_not_utf8_are_replaced_and_counted(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("é \ufffd ".encode() + b"\xff \xe9t\xe9\n")
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "\xff"}\n{"text": "\\ud800 \\ud83d\\ude00"}\n')
    tally = Tally()
    assert texts_of(tmp_path / "x.txt", tally=tally) == ["é \ufffd \ufffd \ufffdt\ufffd\n"]
    assert tally.replaced == 3
    assert texts_of(tmp_path / "x.jsonl", tally=tally) == ["\ufffd", "\ufffd 😀"]
    assert tally.replaced == 5
    texts = texts_of(tmp_path / "x.txt") + texts_of(tmp_path / "x.jsonl")
    assert tally.text_bytes == len("".join(texts).encode())


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfa")
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}')
    assert texts_of(tmp_path / "x.txt") == texts_of(tmp_path / "x.jsonl") == ["a"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data[:40] + b"\0\0\0\0" + data[44:]])
def test_a_damaged_file_is_an_error(tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"x.txt{suffix}"
    path.write_bytes(damage(COMPRESS[suffix](make_text(1000).encode())))
    with pytest.raises(ConfigError, match=rf"x.txt{suffix}': must be a whole {suffix} file"):
        texts_of(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_of_several_frames(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](b"one\n") + COMPRESS[suffix](b"") + COMPRESS[suffix](b"two\n"))
    assert texts_of(path) == ["one\ntwo\n"] or texts_of(path) == ["one\n", "two\n"]


def test_a_record_longer_than_any_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAX_RECORD_BYTES", 1000)
    path = write_jsonl(tmp_path / "x.jsonl", ["a" * 2000])
    with pytest.raises(ConfigError, match="must have records of at most"):
        texts_of(path, 100)


def test_a_wrong_key_is_found_at_once(tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / f"{key}.jsonl", ["a"], key) for key in ("text", "body")]
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "pretty.json").write_text(json.dumps({"text": "a"}, indent=1))
    (tmp_path / "x.txt").write_text("{}")
    with pytest.raises(ConfigError) as caught:
        check_records(find_sources([*paths, *sorted(tmp_path.glob("*.json")), tmp_path]), "text")
    wrong_key, no_lines = map(str, caught.value.problems[:2])
    assert wrong_key == f"--jsonl-key = 'text': must be a key of text in {paths[1]}, which has 'body'"
    assert "pretty.json': must hold one JSON object per line" in no_lines
    assert len(caught.value.problems) == 3


def test_a_sample_is_uniform_bounded_and_repeatable(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [make_text(20, seed) for seed in range(2000)])

    def draw(seed: int) -> list[int]:
        return [chunk.first_line for chunk in sample(read_chunks([Source(path)], 1000), 50_000, seed)]

    lines = draw(1)
    assert lines == sorted(lines) == draw(1) != draw(2)
    size = sum(len(chunk.data) for chunk in sample(read_chunks([Source(path)], 1000), 50_000, 1))
    assert 40_000 < size <= 50_000
    assert 800 < sum(lines) / len(lines) < 1200
    everything = list(read_chunks([Source(path)], 1000))
    assert sample(everything, 1 << 30, 1) == everything
