"""`megatron-tied generate` on an imported model, against transformers, and how bad input ends."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megatron_tied.checkpoint.manifest import Manifest
from megatron_tied.cli.main import main
from megatron_tied.data.tokenizer import SentencePieceTokenizer, train_tokenizer
from tests.convert.hf_models import convert, load, save
from tests.data.corpus import make_text

PROMPT = "the bank of café "
LENGTH = 40


class Model(NamedTuple):
    """A checkpoint, what it was made of, and the tokenizer that it names."""

    checkpoint: Path
    original: Path
    tokenizer: SentencePieceTokenizer

    def expected(self, prompt: str, count: int) -> str:
        """The likeliest continuation, by transformers."""
        reference = load(self.original)
        reference.generation_config.eos_token_id = None
        ids = self.tokenizer.encode(prompt)
        made = reference.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=count)[0].tolist()
        return self.tokenizer.decode(made).rstrip("\N{REPLACEMENT CHARACTER}")


def change_run(checkpoint: Path, **sections: dict[str, Any]) -> None:
    manifest = Manifest.read(checkpoint)
    run = manifest.run | {name: manifest.run[name] | values for name, values in sections.items()}
    dataclasses.replace(manifest, run=run).write(checkpoint)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory = tmp_path_factory.mktemp("generate")
    tokenizer = train_tokenizer([make_text(3000)], 400)
    (directory / "spm.model").write_bytes(tokenizer.model)
    original = save("qwen3_moe", directory / "original", vocab_size=tokenizer.vocab_size)
    checkpoint = convert("hf", "megatron-tied", original, directory / "imported", "--no-verify")
    change_run(checkpoint, data={"tokenizer": str(directory / "spm.model")}, train={"seq_length": LENGTH})
    return Model(checkpoint, original, tokenizer)


def generate(model: Model, *options: str, prompt: str = PROMPT) -> int:
    return main(["generate", "--checkpoint", str(model.checkpoint), "--prompt", prompt, *options])


def test_it_writes_what_transformers_would(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model, "--max-new-tokens", "12") == 0
    told = capsys.readouterr()
    assert told.out == model.expected(PROMPT, 12) + "\n"
    assert f"{model.checkpoint}: 6 layers, " in told.err
    count = len(model.tokenizer.encode(PROMPT))
    assert f"\n12 tokens after {count}, " in told.err
    assert told.err.endswith(" a second; ended by --max-new-tokens 12\n")


def test_it_ends_where_the_model_has_seen_no_more(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    count = LENGTH + 1 - len(model.tokenizer.encode(PROMPT))
    assert generate(model, "--max-new-tokens", "1000") == 0
    told = capsys.readouterr()
    assert told.out == model.expected(PROMPT, count) + "\n"
    assert told.err.endswith(f"ended by the model's sequence length, {LENGTH}\n")


def test_it_ends_with_the_document(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megatron_tied.inference.sampling.Sampler.__call__", lambda *_: model.tokenizer.eod)
    assert generate(model) == 0
    told = capsys.readouterr()
    assert told.out == f"{PROMPT}\n"
    assert "\n1 tokens after " in told.err
    assert told.err.endswith("ended by the token that ends documents\n")


def test_a_seed_decides_what_is_drawn(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("3", "3", "4"):
        assert generate(model, "--temperature", "1.5", "--top-p", "0.95", "--seed", seed) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_the_prompt_may_come_from_standard_input(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "naïve 日本\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt.encode())))
    assert generate(model, "--max-new-tokens", "5", prompt="-") == 0
    assert capsys.readouterr().out == model.expected(prompt, 5) + "\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    assert generate(model, prompt="-") == 2
    assert "--prompt = '-': must be UTF-8" in capsys.readouterr().err


def test_text_appears_as_it_is_made_and_nobody_has_to_read_all_of_it(model: Model) -> None:
    command = [sys.executable, "-m", "megatron_tied.cli.main", "generate", "--checkpoint", str(model.checkpoint)]
    command += ["--prompt", PROMPT]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as job:
        assert job.stdout is not None
        assert job.stderr is not None
        # Well before the line's end, which comes last.
        assert job.stdout.read(len(PROMPT.encode())).decode() == PROMPT
        job.stdout.close()
        errors = job.stderr.read().decode()
    assert job.returncode == 0
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--temperature", "-1"), "--temperature = -1.0: must be a number >= 0"),
        (("--temperature", "nan"), "--temperature = nan: must be a number >= 0"),
        (("--top-p", "0"), "--top-p = 0.0: must be above 0 and at most 1"),
        (("--top-p", "1.01"), "--top-p = 1.01: must be above 0 and at most 1"),
        (("--max-new-tokens", "0"), "--max-new-tokens = 0: must be at least 1"),
        (("--seed", "-1"), "--seed = -1: must be at least 0 and below 2^63"),
        (("--prompt", ""), "--prompt = '': must have text: the tokenizer has no token that begins one"),
        (("--prompt", "a\udcff"), r"--prompt = 'a\udcff': must be UTF-8"),
        (("--prompt", "the " * 99), f"tokens, and the model knows sequences of {LENGTH}"),
        (("--checkpoint", "/nowhere"), "--checkpoint = '/nowhere': must be a checkpoint, or a run that has one: "),
        (("--tokenizer", "/nowhere"), "--tokenizer = '/nowhere': must be a SentencePiece model, "),
    ],
)
def test_bad_input(
    model: Model,
    options: tuple[str, ...],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("megatron_tied.inference.loading.load_model", None)
    assert generate(model, *options) == 2
    assert told in capsys.readouterr().err


def test_no_tokenizer_or_one_that_is_too_large(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = convert("hf", "megatron-tied", model.original, tmp_path / "other", "--no-verify")
    shutil.rmtree(other / "hf")
    for data, valid in (({"tokenizer": None}, "the checkpoint names none"), ({"tokenizer": "/x"}, "/x, is not here")):
        change_run(other, data=data)
        assert main(["generate", "--checkpoint", str(other), "--prompt", "a"]) == 2
        told = capsys.readouterr().err
        assert "--tokenizer = None: must be given: " in told
        assert valid in told
    larger = tmp_path / "larger.model"
    larger.write_bytes(train_tokenizer([make_text(3000)], 410).model)
    assert generate(model, "--tokenizer", str(larger)) == 2
    assert "has 410 tokens, and the model knows 400" in capsys.readouterr().err


def test_an_empty_prompt_begins_with_the_token_that_begins_texts(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(SentencePieceTokenizer, "bos", model.tokenizer.encode("the")[-1])
    assert generate(model, "--max-new-tokens", "6", prompt="") == 0
    assert "the" + capsys.readouterr().out == model.expected("the", 6) + "\n"


def test_a_launcher_is_told_off(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert generate(model) == 2
    assert "WORLD_SIZE = 2: must be 1: start it without a launcher" in capsys.readouterr().err
