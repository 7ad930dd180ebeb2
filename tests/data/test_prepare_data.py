from __future__ import annotations

import gzip
import itertools
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_tied.cli.main import main
from megatron_tied.data import encode, writer
from megatron_tied.data import prepare as room
from megatron_tied.data.metadata import Index, Metadata
from megatron_tied.data.prepare import prepare_data
from megatron_tied.data.staging import Staging
from megatron_tied.data.tokenizer import SentencePieceTokenizer
from megatron_tied.data.writer import Writer
from megatron_tied.errors import ConfigError
from tests.data.corpus import make_text, write_jsonl

SUFFIXES = (".bin", ".idx", ".json", ".model")


def stored_documents(prefix: Path) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = IndexedDataset(str(prefix))
    bounds = data.document_indices
    return [np.concatenate(data[begin:end]).tolist() for begin, end in itertools.pairwise(bounds)]


def files(prefix: Path) -> dict[str, bytes]:
    return {path.name.removeprefix(prefix.name): path.read_bytes() for path in prefix.parent.glob(f"{prefix.name}.*")}


def leftovers(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.suffix != ".jsonl")


def in_child(action: Callable[[], object]) -> int:
    """Runs `action` in a forked process, which it may kill; the exit code."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = int(action() or 0)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_documents_come_back_each_with_its_separator(
    tmp_path: Path, model: Path, tokenizer: SentencePieceTokenizer
) -> None:
    texts = [make_text(50, seed) for seed in range(30)]
    source = write_jsonl(tmp_path / "x.jsonl", [*texts, ""])
    with source.open("ab") as file:
        file.write(b'{"text": "\xff"}\n{"text": null}\n')
    prepared = prepare_data([source], tmp_path / "out" / "a.b", tokenizer=model, workers=1)
    prefix = tmp_path / "out" / "a.b"
    expected = [[*tokenizer.encode(text), tokenizer.eod] for text in [*texts, "\ufffd"]]
    assert stored_documents(prefix) == expected
    assert Metadata.read(prefix) == prepared.metadata
    assert prepared.metadata == Metadata(
        documents=31,
        tokens=sum(map(len, expected)),
        max_token_id=max(map(max, expected)),
        vocab_size=320,
        eod=1,
        dtype="uint16",
        tokenizer=os.path.relpath(model, prefix.parent),
        tokenizer_sha256=tokenizer.sha256,
        source_bytes=sum(len(text.encode()) for text in texts) + 3,
        skipped_records=1,
        empty_records=1,
        replaced_characters=1,
    )
    assert sorted(files(prefix)) == [".bin", ".idx", ".json"]


def test_a_directory_of_mixed_files(tmp_path: Path, model: Path, tokenizer: SentencePieceTokenizer) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a.txt").write_text("first\nfile")
    (tree / "b.py.gz").write_bytes(gzip.compress(b"second"))
    write_jsonl(tree / "c.jsonl", ["third", "fourth"])
    (tree / "d.md").write_text("")
    prepare_data([tree], tmp_path / "x", tokenizer=model)
    texts = [tokenizer.decode(ids) for ids in stored_documents(tmp_path / "x")]
    assert texts == ["first\nfile", "second", "third", "fourth"]


def test_the_files_do_not_depend_on_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_BYTES_WORTH_A_WORKER", 1)
    monkeypatch.setattr(encode, "CHUNK_BYTES", 10_000)
    inputs = [tmp_path / "a.txt", write_jsonl(tmp_path / "b.jsonl", [make_text(n, n) for n in range(300)])]
    inputs[0].write_text(make_text(300_000))
    for number in range(40):
        inputs.append(tmp_path / f"{number}.txt")
        inputs[-1].write_text(make_text(1000, number))
    results = []
    for workers in (1, 3):
        prefix = tmp_path / str(workers) / "x"
        prepared = prepare_data(inputs, prefix, vocab_size=400, workers=workers)
        assert prepared.workers == workers
        results.append(files(prefix))
    assert sorted(results[0]) == sorted(SUFFIXES)
    assert results[0] == results[1]


def test_a_long_text_file_is_one_document_and_one_sequence(
    tmp_path: Path, model: Path, tokenizer: SentencePieceTokenizer
) -> None:
    text = make_text(250_000)
    (tmp_path / "x.txt").write_text(text)
    assert len(text) > 1 << 20
    prepare_data([tmp_path / "x.txt"], tmp_path / "x", tokenizer=model, workers=1)
    assert stored_documents(tmp_path / "x") == [[*tokenizer.encode(text), tokenizer.eod]]
    assert len(Index.read(tmp_path / "x").lengths) == 1


def test_a_document_too_long_for_one_sequence_becomes_several(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_MAX_SEQUENCE_TOKENS", 1000)
    text = make_text(400_000)
    (tmp_path / "x.txt").write_text(text)
    metadata = prepare_data([tmp_path / "x.txt"], tmp_path / "x", tokenizer=model, workers=1).metadata
    assert metadata.documents == len(stored_documents(tmp_path / "x")) == 1
    index = Index.read(tmp_path / "x")
    assert len(index.lengths) > 1
    assert index.tokens == metadata.tokens


def test_the_trained_tokenizer_saw_the_whole_corpus(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["aardvark aardvark " * 500])
    write_jsonl(tmp_path / "b.jsonl", ["zebra zebra " * 500])
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    prepared = prepare_data(inputs, tmp_path / "x", vocab_size=280)
    assert prepared.tokenizer == tmp_path / "x.model"
    assert prepared.metadata.tokenizer == "x.model"
    tokenizer = SentencePieceTokenizer.load(prepared.tokenizer)
    assert len(tokenizer.encode(" zebra aardvark")) == 2


def test_what_exists_is_replaced_only_when_asked(tmp_path: Path, model: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", ["one"])
    prepare_data([source], tmp_path / "x", tokenizer=model)
    write_jsonl(source, ["one", "two"])
    before = files(tmp_path / "x")
    with pytest.raises(ConfigError, match=r"--output = '.*x': exists \(.*x.json\); --overwrite replaces it"):
        prepare_data([source], tmp_path / "x", tokenizer=model)
    assert files(tmp_path / "x") == before
    assert leftovers(tmp_path) == ["x.bin", "x.idx", "x.json"]
    assert prepare_data([source], tmp_path / "x", tokenizer=model, overwrite=True).metadata.documents == 2
    assert len(stored_documents(tmp_path / "x")) == 2


@pytest.mark.parametrize("suffix", [".idx", ".model"])
def test_files_of_others_are_not_replaced(tmp_path: Path, suffix: str) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", [make_text(100)])
    (tmp_path / f"x{suffix}").write_bytes(b"precious")
    with pytest.raises(ConfigError, match="--overwrite"):
        prepare_data([source], tmp_path / "x", vocab_size=300)
    assert files(tmp_path / "x") == {suffix: b"precious", ".jsonl": source.read_bytes()}


def test_a_prefix_that_another_run_is_writing(tmp_path: Path, model: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", ["one"])
    with Staging(tmp_path / "x", overwrite=False, writes_model=False) as staging:
        staging.path(".bin").write_bytes(b"half")
        with pytest.raises(ConfigError, match="is being written by another run"):
            prepare_data([source], tmp_path / "x", tokenizer=model)
        assert staging.path(".bin").read_bytes() == b"half"
    assert leftovers(tmp_path) == []


def test_what_a_killed_run_staged_is_forgotten(tmp_path: Path, model: Path) -> None:
    staged = tmp_path / ".x.partial"
    staged.mkdir()
    (staged / "x.model").write_bytes(b"half")
    prepare_data([write_jsonl(tmp_path / "x.jsonl", ["one"])], tmp_path / "x", tokenizer=model)
    assert leftovers(tmp_path) == ["x.bin", "x.idx", "x.json"]


@pytest.mark.parametrize("renamed", range(4))
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_killed_while_renaming_left_nothing_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renamed: int, overwrite: bool
) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", [make_text(100)])
    if overwrite:
        prepare_data([source], tmp_path / "x", vocab_size=290)
    write_jsonl(source, [make_text(100), "new"])

    def killed() -> None:
        calls = 0
        replace = os.replace

        def counted(old: Path, new: Path) -> None:
            nonlocal calls
            if calls == renamed:
                os._exit(7)
            calls += 1
            replace(old, new)

        monkeypatch.setattr(os, "replace", counted)
        prepare_data([source], tmp_path / "x", vocab_size=300, overwrite=overwrite)

    assert in_child(killed) == 7
    assert ".json" not in files(tmp_path / "x")
    assert prepare_data([source], tmp_path / "x", vocab_size=300).metadata.documents == 2
    assert leftovers(tmp_path) == ["x.bin", "x.idx", "x.json", "x.model"]


def test_a_run_that_fails_while_renaming_removes_what_it_renamed(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def failing(old: Path, new: Path) -> None:
        if new.suffix == ".json":
            raise OSError("no space left")
        replace(old, new)

    monkeypatch.setattr(os, "replace", failing)
    source = write_jsonl(tmp_path / "x.jsonl", ["one"])
    with pytest.raises(OSError, match="no space left"):
        prepare_data([source], tmp_path / "x", tokenizer=model)
    assert leftovers(tmp_path) == []


def test_a_full_disk(tmp_path: Path, model: Path, capfd: pytest.CaptureFixture) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", [make_text(50_000)])

    def limited() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        return main(
            ["prepare-data", "--input", str(source), "--output", str(tmp_path / "x"), "--tokenizer", str(model)]
        )

    assert in_child(limited) == 1
    assert "File too large; no data set was written" in capfd.readouterr().err
    assert leftovers(tmp_path) == []


def test_an_interrupt(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupted(self: object, batch: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "add", interrupted)
    source = write_jsonl(tmp_path / "x.jsonl", ["one"])
    command = ["prepare-data", "--input", str(source), "--output", str(tmp_path / "x"), "--tokenizer", str(model)]
    assert main(command) == 130
    assert "interrupted; no data set was written" in capsys.readouterr().err
    assert leftovers(tmp_path) == []


def test_the_command_tells_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", [make_text(200), "two", ""], key="body")
    output = tmp_path / "x"
    command = ["prepare-data", "--input", str(source), "--output", str(output), "--jsonl-key", "body"]
    assert main([*command, "--train-tokenizer", "--vocab-size", "300", "--workers", "1"]) == 0
    out, err = capsys.readouterr()
    metadata = json.loads((tmp_path / "x.json").read_text())
    assert err == ""
    assert f"Prepared {output}.bin" in out
    assert f"{metadata['tokens']:,} of uint16" in out
    assert "documents   2\n" in out
    assert "empty       1 records" in out
    assert len(out.splitlines()) < 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train-tokenizer"], "--vocab-size = None: must be an integer of 1 to 2,147,483,647"),
        (["--train-tokenizer", "--vocab-size", "3000000000"], "--vocab-size = 3000000000: must be an integer of 1 to"),
        (["--tokenizer", ""], "--tokenizer = '': must be a file, a directory, or tiktoken:NAME"),
        (["--train-tokenizer", "--vocab-size", "9000"], "--vocab-size = 9000: must be <= "),
        (["--train-tokenizer", "--vocab-size", "300", "--workers", "0"], "--workers = 0: must be"),
        (["--train-tokenizer", "--vocab-size", "300", "--sample-mib", "1e-9"], "--sample-mib = 0.0: must be > 0"),
        (["--train-tokenizer", "--vocab-size", "300", "--jsonl-key", "body"], "--jsonl-key = 'body': must be a key"),
        (["--tokenizer", "none.model"], "--tokenizer = 'none.model': must be a SentencePiece model"),
        (["--tokenizer", "none.model", "--vocab-size", "300"], "--vocab-size = 300: must be left out"),
    ],
)
def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], message: str) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", [make_text(100)])
    assert main(["prepare-data", "--input", str(source), "--output", str(tmp_path / "x"), *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert leftovers(tmp_path) == []


def test_input_without_text(tmp_path: Path, model: Path) -> None:
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ConfigError, match=r"--input .* must hold text"):
        prepare_data([tmp_path / "x.txt"], tmp_path / "x", tokenizer=model)


@pytest.mark.parametrize("output", ["", "directory"])
def test_a_prefix_that_is_a_directory(
    tmp_path: Path, model: Path, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "directory").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="must be a prefix for file names"):
        prepare_data([tmp_path], output, tokenizer=model)


def test_an_empty_name_is_not_the_working_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("text")
    options = ["--output", "x", "--train-tokenizer", "--vocab-size", "300"]
    assert main(["prepare-data", "--input", "", *options]) == 2
    assert "--input = '': must be an existing file or directory" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0", "nan", "inf", "much"])
def test_samples_of_no_size(size: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["prepare-data", "--input", "x", "--output", "y", "--train-tokenizer", "--sample-mib", size])
    assert f"argument --sample-mib: '{size}' must be a number > 0" in capsys.readouterr().err
