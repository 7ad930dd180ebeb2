"""What goes with the weights: tokenizers that fit, their special tokens, and files that are found again after runs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_tied.checkpoint.manifest import Manifest
from megatron_tied.cli.main import main
from megatron_tied.convert.companions import Companions
from megatron_tied.convert.sources import CheckpointSource
from megatron_tied.convert.tokenizer import put_tokenizer
from megatron_tied.data.tokenizer import SentencePieceTokenizer, train_tokenizer
from megatron_tied.errors import ConfigError
from tests.convert.hf_models import convert, save
from tests.data.corpus import make_text

SIZE = 400


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "m.model"
    path.write_bytes(train_tokenizer([make_text(900, seed) for seed in range(20)], SIZE).model)
    return path


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def change(path: Path, **keys: object) -> None:
    path.write_text(json.dumps((read(path) if path.exists() else {}) | keys))


@pytest.fixture
def original(model_file: Path, tmp_path: Path) -> Path:
    """A model with a tokenizer, and with tokens that are not this one's."""
    directory = save("olmoe", tmp_path / "original", vocab_size=SIZE)
    put_tokenizer(model_file, directory)
    change(directory / "generation_config.json", eos_token_id=[7, 8], bos_token_id=6, temperature=0.5)
    change(directory / "config.json", eos_token_id=7, bos_token_id=6)
    return directory


def refused(capsys: pytest.CaptureFixture[str], directory: Path, target: str, *options: str) -> str:
    out = directory.parent / "refused"
    arguments = ["convert", "--from", "hf", "--to", target, "--input", str(directory), "--output", str(out)]
    assert main([*arguments, "--no-verify", *options]) == 2
    assert not out.exists()
    return capsys.readouterr().err


@pytest.mark.parametrize("target", ["hf", "megatron-tied"])
def test_a_tokenizer_with_tokens_beyond_the_vocabulary(
    target: str, model_file: Path, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = save("olmoe", tmp_path / "small")
    for given in (model_file, original):
        error = refused(capsys, small, target, "--tokenizer", str(given))
        assert f"--tokenizer = '{given}': has token id 399" in error
        assert "and the model knows those below 96: name another by --tokenizer, or none" in error
    shutil.copy(model_file, small / "tokenizer.model")
    assert f"--input = '{small}': has token id 399" in refused(capsys, small, target)
    (small / "tokenizer.model").unlink()
    (small / "vocab.json").write_text(json.dumps({"a": 0, "b": 96}))
    assert "has token id 96 ('b')" in refused(capsys, small, target)
    (small / "vocab.json").write_text(json.dumps({"a": 0, "b": 95}))
    (small / "added_tokens.json").write_text(json.dumps({"c": 96}))
    assert "has token id 96 ('c')" in refused(capsys, small, target)
    convert("hf", target, small, tmp_path / "out", "--no-verify", "--tokenizer", "none")
    assert not list((tmp_path / "out").rglob("vocab.json"))


@pytest.mark.parametrize("target", ["hf", "megatron-tied"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("generation_config.json", "{nope", "cannot be read"),
        ("generation_config.json", '{"eos_token_id": "zz"}', "generation_config.json: eos_token_id = 'zz': must be"),
        ("generation_config.json", '{"eos_token_id": [400]}', "eos_token_id = [400]: must be below vocab_size, 400"),
        ("tokenizer.json", "{nope", "is no tokenizer"),
        ("tokenizer.json", "{}", "is no tokenizer"),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
    ],
)
def test_broken_files_are_refused(
    target: str, name: str, content: str, message: str, original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (original / name).write_text(content)
    assert message in refused(capsys, original, target)


def test_code_is_not_asked_for_by_what_is_written(original: Path, tmp_path: Path) -> None:
    before = read(original / "tokenizer_config.json")
    change(original / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_x.X", None]})
    imported = convert("hf", "megatron-tied", original, tmp_path / "imported", "--no-verify")
    assert read(imported / "hf" / "tokenizer_config.json") == before


@pytest.mark.parametrize("as_directory", [True, False])
def test_special_tokens_are_those_of_the_tokenizer_that_is_given(
    as_directory: bool, model_file: Path, original: Path, tmp_path: Path
) -> None:
    eod = SentencePieceTokenizer.load(model_file).eod
    assert eod not in (6, 7, 8)
    given = original if as_directory else model_file
    wanted = {"eos_token_id": eod, "temperature": 0.5}

    def check(directory: Path) -> None:
        generation, config = (read(directory / name) for name in ("generation_config.json", "config.json"))
        generation.pop("transformers_version", None)
        assert {key: generation[key] for key in generation.keys() & {*wanted, "bos_token_id"}} == wanted
        assert (config.get("bos_token_id"), config["eos_token_id"]) == (None, eod)

    check(convert("hf", "hf", original, tmp_path / "plain", "--no-verify", "--tokenizer", str(given)))
    imported = convert("hf", "megatron-tied", original, tmp_path / "in", "--no-verify", "--tokenizer", str(given))
    exported = ["--input", str(imported), "--output", str(tmp_path / "out"), "--no-verify"]
    assert main(["convert", "--from", "megatron-tied", "--to", "hf", *exported]) == 0
    check(tmp_path / "out")


def test_without_one_given_they_stay(original: Path, tmp_path: Path) -> None:
    exported = ["--input", str(original), "--output", str(tmp_path / "out"), "--no-verify"]
    assert main(["convert", "--from", "hf", "--to", "hf", *exported]) == 0
    assert read(tmp_path / "out" / "generation_config.json") == read(original / "generation_config.json")
    assert read(tmp_path / "out" / "config.json")["eos_token_id"] == 7


def as_run(imported: Path, run: Path, recorded: str, **train: str) -> Path:
    """A run's first checkpoint, as it would look if it had begun with what `train` says."""
    checkpoint = run / "checkpoints" / "step_00000001"
    shutil.copytree(imported, checkpoint, ignore=shutil.ignore_patterns("hf"))
    manifest = Manifest.read(checkpoint)
    told = manifest.run | {"train": manifest.run["train"] | {"run_dir": recorded, **train}}
    dataclasses.replace(manifest, run=told).write(checkpoint)
    (run / "checkpoints" / "latest").write_text("step_00000001\n")
    return run


@pytest.mark.parametrize("key", ["init_from", "resume"])
def test_files_are_found_by_way_of_all_runs_wherever_they_were_started(
    key: str, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = convert("hf", "megatron-tied", original, tmp_path / "imported", "--no-verify")
    first = as_run(imported, tmp_path / "runs" / "one", "runs/one", **{key: "imported"})
    second = as_run(imported, tmp_path / "runs" / "two", str(tmp_path / "runs" / "two"), **{key: str(first)})
    third = as_run(imported, tmp_path / "runs" / "three", "runs/three", **{key: "runs/two", "init_from": "runs/two"})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for run in (first, second, third):
        found = Companions.of(CheckpointSource(run), None, exported=True)
        assert found.config == imported / "hf" / "config.json"
        assert found.tokenizer == imported / "hf"


def test_runs_that_name_each_other_have_no_files(original: Path, tmp_path: Path) -> None:
    imported = convert("hf", "megatron-tied", original, tmp_path / "imported", "--no-verify")
    one = as_run(imported, tmp_path / "one", "one", init_from=str(tmp_path / "two"))
    as_run(imported, tmp_path / "two", "two", init_from=str(one))
    assert Companions.of(CheckpointSource(one), "none", exported=True) == Companions(None, None, None, {})
    with pytest.raises(ConfigError, match="must be given, a directory or a SentencePiece model"):
        Companions.of(CheckpointSource(one), None, exported=True)
