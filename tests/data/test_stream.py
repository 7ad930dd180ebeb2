"""Data sets of Hugging Face's `datasets`, from local directories of the schema of those on the hub."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_tied.cli.main import main
from megatron_tied.data import prepare as room
from megatron_tied.data import stream
from megatron_tied.data.metadata import Metadata
from megatron_tied.data.prepare import Request, prepare_data, prepare_dataset
from megatron_tied.data.tokenizer import SentencePieceTokenizer
from megatron_tied.data.writer import Writer
from megatron_tied.errors import ConfigError
from tests.data.corpus import make_text, write_jsonl
from tests.data.hf import dclm_edu, finephrase
from tests.data.test_prepare_data import files, stored_documents

TEXTS = [[make_text(40 + row, 100 * file + row) for row in range(50)] for file in range(6)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """So that a small data set is many batches, each of which is saved."""
    monkeypatch.setattr(stream, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(room, "_SAVE_BYTES", 1)
    monkeypatch.setattr("megatron_tied.data.encode.CHUNK_BYTES", 2000)


@pytest.fixture
def dclm(tmp_path: Path) -> Path:
    return dclm_edu(tmp_path / "dclm", TEXTS)


@pytest.fixture
def texts_of(tokenizer: SentencePieceTokenizer) -> Callable[[Path], list[str]]:
    return lambda prefix: [tokenizer.decode(ids) for ids in stored_documents(prefix)]


def interrupt_after(monkeypatch: pytest.MonkeyPatch, batches: int, error: BaseException) -> None:
    add, left = Writer.add, batches

    def counted(self: Writer, batch: object) -> None:
        nonlocal left
        if left == 0:
            raise error
        left -= 1
        add(self, batch)

    monkeypatch.setattr(Writer, "add", counted)


@contextmanager
def interrupted_after(monkeypatch: pytest.MonkeyPatch, batches: int, error: BaseException) -> Iterator[None]:
    with monkeypatch.context() as patched:
        interrupt_after(patched, batches, error)
        with pytest.raises(type(error)):
            yield


def test_rows_become_documents_in_order(dclm: Path, tmp_path: Path, model: Path, texts_of: Callable) -> None:
    prepared = prepare_dataset(Request(str(dclm)), tmp_path / "x", tokenizer=model, workers=1)
    flat = [text for rows in TEXTS for text in rows]
    assert texts_of(tmp_path / "x") == flat
    data = prepared.metadata
    assert data == Metadata.read(tmp_path / "x")
    assert data.source_bytes == prepared.text_bytes == sum(len(text.encode()) for text in flat)
    assert data.source["dataset"] == str(dclm)
    prepare_data([write_jsonl(tmp_path / "y.jsonl", flat)], tmp_path / "y", tokenizer=model, workers=1)
    for suffix in (".bin", ".idx"):
        assert files(tmp_path / "x")[suffix] == files(tmp_path / "y")[suffix]


def test_the_rephrased_text_is_nested(tmp_path: Path, model: Path, texts_of: Callable) -> None:
    path = str(finephrase(tmp_path / "fp", TEXTS[:2]))
    flat = TEXTS[0] + TEXTS[1]
    for key, expected in (("text", [f"original of {text}" for text in flat]), ("rollout_results.text", flat)):
        prepare_dataset(Request(path, text_key=key), tmp_path / key, tokenizer=model, workers=1)
        assert texts_of(tmp_path / key) == expected


def test_json_lines_with_several_texts_a_row(tmp_path: Path, model: Path, texts_of: Callable) -> None:
    (tmp_path / "d").mkdir()
    rows = [{"turns": [{"text": "a"}, {"text": "b"}]}, {"turns": []}, {"turns": [{"text": "c"}, {"text": None}]}]
    (tmp_path / "d" / "0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    request = Request(str(tmp_path / "d"), text_key="turns.text")
    prepared = prepare_dataset(request, tmp_path / "x", tokenizer=model, workers=1)
    assert texts_of(tmp_path / "x") == ["a", "b", "c"]
    assert prepared.metadata.skipped_records == 2
    assert prepared.first_skipped.startswith(f"{tmp_path / 'd'} after row 0")


@pytest.mark.parametrize("separator", ["before", "after"])
def test_one_separator_a_document(
    dclm: Path, tmp_path: Path, model: Path, tokenizer: SentencePieceTokenizer, separator: str
) -> None:
    request = Request(str(dclm), max_rows=60)
    prepare_dataset(request, tmp_path / "x", tokenizer=model, workers=1, separator=separator)
    expected = [tokenizer.encode(text) for text in (TEXTS[0] + TEXTS[1])[:60]]
    eod = [tokenizer.eod]
    assert stored_documents(tmp_path / "x") == [eod + ids if separator == "before" else ids + eod for ids in expected]
    assert Metadata.read(tmp_path / "x").separator == separator


def test_a_long_text_file_has_its_separator_before_it_once(
    tmp_path: Path, model: Path, tokenizer: SentencePieceTokenizer
) -> None:
    (tmp_path / "x.txt").write_text(make_text(250_000))
    prepare_data([tmp_path / "x.txt"], tmp_path / "x", tokenizer=model, workers=1, separator="before")
    [ids] = stored_documents(tmp_path / "x")
    assert ids[0] == tokenizer.eod
    assert ids.count(tokenizer.eod) == 1


def test_held_out_rows_are_not_trained_on(dclm: Path, tmp_path: Path, model: Path, texts_of: Callable) -> None:
    prepare_dataset(Request(str(dclm), shuffle_files=7, max_rows=70), tmp_path / "held", tokenizer=model, workers=1)
    prepare_dataset(Request(str(dclm), shuffle_files=7, skip_rows=70), tmp_path / "train", tokenizer=model, workers=1)
    held, train = texts_of(tmp_path / "held"), texts_of(tmp_path / "train")
    assert len(held) == 70
    drawn = [TEXTS.index(next(rows for rows in TEXTS if text in rows)) for text in (held + train)[::50]]
    assert sorted(drawn) == list(range(6)) != drawn
    assert held + train == [text for file in drawn for text in TEXTS[file]]


def test_it_stops_when_there_are_tokens_enough(dclm: Path, tmp_path: Path, model: Path, texts_of: Callable) -> None:
    data = prepare_dataset(Request(str(dclm)), tmp_path / "x", tokenizer=model, max_tokens=9000, workers=1).metadata
    assert 9000 <= data.tokens < 9000 + 2000
    flat = [text for rows in TEXTS for text in rows]
    assert texts_of(tmp_path / "x") == flat[: data.documents]
    assert data.source_bytes == sum(len(text.encode()) for text in flat[: data.documents])


@pytest.mark.parametrize("batches", [0, 1, 4])
def test_an_interrupted_run_is_gone_on_with(
    dclm: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, batches: int
) -> None:
    request = Request(str(dclm), shuffle_files=1, skip_rows=3)
    asked = {"tokenizer": model, "max_tokens": 20_000, "separator": "before"}
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    prepare_dataset(request, tmp_path / "whole" / "x", workers=2, **asked)
    read = 0
    texts = stream._texts

    def counted(value: object, path: list[str]) -> object:
        nonlocal read
        read += isinstance(value, dict)
        return texts(value, path)

    monkeypatch.setattr(stream, "_texts", counted)
    for error in (KeyboardInterrupt, OSError):
        with interrupted_after(monkeypatch, batches, error()):
            prepare_dataset(request, tmp_path / "parts" / "x", workers=1, **asked)
        assert list((tmp_path / "parts").glob("x*")) == []
    rows_before, read = read, 0
    with (tmp_path / "parts" / ".x.partial" / "x.bin").open("ab") if batches else open(os.devnull, "ab") as file:
        file.write(b"written after the last save")
    prepared = prepare_dataset(request, tmp_path / "parts" / "x", workers=1, **asked)
    assert files(tmp_path / "parts" / "x") == files(tmp_path / "whole" / "x")
    assert [path.name for path in sorted((tmp_path / "parts").iterdir())] == ["x.bin", "x.idx", "x.json"]
    whole = prepared.metadata.documents
    assert rows_before > 0
    # What was saved is not read again: two interrupted runs saved `batches` each.
    assert read <= whole + 20 - 2 * batches * 4
    assert (prepared.text_bytes < prepared.metadata.source_bytes) == bool(batches)


def test_a_run_with_other_options_does_not_go_on(
    dclm: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = tmp_path / "x"
    with interrupted_after(monkeypatch, 3, KeyboardInterrupt()):
        prepare_dataset(Request(str(dclm)), prefix, tokenizer=model, workers=1)
    with pytest.raises(ConfigError, match=r"was begun with skip_rows 0, not 5; separator 'after', not 'before'"):
        prepare_dataset(Request(str(dclm), skip_rows=5), prefix, tokenizer=model, separator="before")
    source = write_jsonl(tmp_path / "y.jsonl", ["one"])
    with pytest.raises(ConfigError, match=r"is an unfinished data set of .*dclm; --overwrite starts anew"):
        prepare_data([source], prefix, tokenizer=model)
    dclm_edu(tmp_path / "other", [["new"]])
    (tmp_path / "other" / "000.parquet").replace(dclm / "000.parquet")
    with pytest.raises(ConfigError, match="was begun with files_sha256"):
        prepare_dataset(Request(str(dclm)), prefix, tokenizer=model)
    data = prepare_dataset(Request(str(dclm)), prefix, tokenizer=model, workers=1, overwrite=True).metadata
    assert data.documents == 251


def test_an_unfinished_data_set_is_kept_when_the_finished_one_is_not_to_be_replaced(
    dclm: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"tokenizer": model, "workers": 1}
    prepare_dataset(Request(str(dclm), max_rows=5), tmp_path / "x", **asked)
    with interrupted_after(monkeypatch, 3, KeyboardInterrupt()):
        prepare_dataset(Request(str(dclm)), tmp_path / "x", overwrite=True, **asked)
    with pytest.raises(ConfigError, match="--overwrite replaces it"):
        prepare_dataset(Request(str(dclm)), tmp_path / "x", **asked)
    prepared = prepare_dataset(Request(str(dclm)), tmp_path / "x", overwrite=True, **asked)
    assert 0 < prepared.text_bytes < prepared.metadata.source_bytes


def test_a_killed_run_is_gone_on_with_by_the_same_command(tmp_path: Path, model: Path) -> None:
    text = make_text(20_000)
    source = dclm_edu(tmp_path / "d", [[text] * 200] * 2)
    command = ["prepare-data", "--dataset", str(source), "--tokenizer", str(model), "--workers", "1"]
    code = "from megatron_tied.data import prepare; prepare._SAVE_BYTES = 1 << 20\n"
    code += "import sys; from megatron_tied.cli.main import main; sys.exit(main(sys.argv[1:]))"
    killed = subprocess.Popen([sys.executable, "-c", code, *command, "--output", str(tmp_path / "x")])
    saved = tmp_path / ".x.partial" / "x.saved"
    end = time.monotonic() + 120
    while not saved.exists():
        assert time.monotonic() < end
        assert killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert list(tmp_path.glob("x.*")) == []
    for output in ("x", "whole"):
        assert main([*command, "--output", str(tmp_path / output)]) == 0
    assert files(tmp_path / "x") == files(tmp_path / "whole")


def test_the_command(dclm: Path, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["prepare-data", "--dataset", str(dclm), "--output", str(tmp_path / "x"), "--tokenizer", str(model)]
    options = ["--text-key", "text", "--split", "train", "--shuffle-files", "1", "--skip-rows", "2", "--workers", "1"]
    assert main([*command, *options, "--max-rows", "20", "--max-tokens", "1000000"]) == 0
    out = capsys.readouterr().out
    assert "documents   20\n" in out
    assert "short       the rows ended before 1,000,000 tokens" in out
    source = Metadata.read(tmp_path / "x").source
    assert (source["skip_rows"], source["max_rows"], source["shuffle_files"]) == (2, 20, 1)


def test_the_command_interrupted(
    dclm: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    command = ["prepare-data", "--dataset", str(dclm), "--output", str(tmp_path / "x"), "--tokenizer", str(model)]
    with monkeypatch.context() as patched:
        interrupt_after(patched, 3, KeyboardInterrupt())
        assert main([*command, "--workers", "1"]) == 130
    assert "interrupted; the same command goes on where it was saved" in capsys.readouterr().err
    assert main([*command, "--workers", "1"]) == 0
    assert "bytes, of runs that were interrupted" in capsys.readouterr().out


def test_what_breaks_off_is_no_bug_of_ours(
    dclm: Path, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture
) -> None:
    damaged = dclm / "003.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    command = ["prepare-data", "--dataset", str(dclm), "--output", str(tmp_path / "x"), "--tokenizer", str(model)]
    assert main([*command, "--workers", "1"]) == 1
    assert f"reading {dclm}: ArrowInvalid" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text-key", "body"], "--text-key = 'body': must be a key of text; the first row has text, url"),
        (["--text-key", "edu_int_score"], "--text-key = 'edu_int_score': must be a key of text"),
        (["--split", "test"], "--split = 'test': must be one of train"),
        (["--dataset-config", "faq"], "cannot be opened with --dataset-config faq"),
        (["--max-tokens", "0"], "--max-tokens = 0: must be an integer >= 1"),
        (["--max-rows", "0"], "--max-rows = 0: must be an integer >= 1"),
        (["--skip-rows", "-1"], "--skip-rows = -1: must be an integer >= 0"),
        (["--skip-rows", "300"], "must hold text in the rows that are asked for"),
    ],
)
def test_bad_input(
    dclm: Path, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture, options: list[str], message: str
) -> None:
    command = ["prepare-data", "--dataset", str(dclm), "--output", str(tmp_path / "x"), "--tokenizer", str(model)]
    assert main([*command, "--workers", "1", *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["dclm"]


def test_options_that_need_the_other_source(dclm: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = ["--output", str(tmp_path / "x")]
    trained = ["--train-tokenizer", "--vocab-size", "300"]
    assert main(["prepare-data", "--dataset", str(dclm), *output, *trained]) == 2
    assert "--train-tokenizer = True: needs --input" in capsys.readouterr().err
    assert main(["prepare-data", "--input", str(tmp_path), *output, *trained, "--max-tokens", "5"]) == 2
    assert "--max-tokens = 5: needs --dataset" in capsys.readouterr().err


def test_files_that_are_no_text(tmp_path: Path, model: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_text("x")
    with pytest.raises(ConfigError, match="must have files of parquet, json, csv, arrow; its are text"):
        prepare_dataset(Request(str(tmp_path / "d")), tmp_path / "x", tokenizer=model)


def test_only_the_column_of_the_text_is_read(dclm: Path) -> None:
    opened = stream.Stream(Request(str(dclm)))
    assert set(next(iter(opened._rows))) == {"text"}


def test_without_datasets(dclm: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"needs datasets: pip install 'megatron-tied\[paper\]'"):
        prepare_dataset(Request(str(dclm)), tmp_path / "x", tokenizer=model)
