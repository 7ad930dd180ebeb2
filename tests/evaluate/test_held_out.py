"""`megatron-tied evaluate`: the loss of each domain, told by the run itself and by transformers."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_tied.cli.main import main
from megatron_tied.data.metadata import Index
from megatron_tied.data.prepare import prepare_data
from megatron_tied.evaluate import held_out
from tests.data.corpus import make_text, write_jsonl
from tests.evaluate.conftest import SEQ_LENGTH, Trained
from tests.training.runs import Corpus, deepspeed_command, finish, series


def evaluate(trained: Trained, file: Path, *arguments: str) -> dict[str, Any]:
    """The domains of the JSON file."""
    assert main(["evaluate", "--checkpoint", str(trained.run), "--json", str(file), "--data", *arguments]) == 0
    return json.loads(file.read_text())["domains"]


@torch.no_grad()
def by_transformers(trained: Trained, prefix: Path, seq_length: int) -> list[float]:
    """The loss of every token after the first, in windows of `seq_length`."""
    model = trained.reference()
    index = Index.read(prefix)
    ids = torch.from_numpy(np.fromfile(f"{prefix}.bin", index.dtype).astype(np.int64))
    losses: list[float] = []
    for start in range(0, len(ids) - 1, seq_length):
        window = ids[start : start + seq_length + 1]
        losses += torch.nn.functional.cross_entropy(
            model(window[None, :-1]).logits[0], window[1:], reduction="none"
        ).tolist()
    return losses


def test_the_loss_is_the_validation_loss_of_the_run(trained: Trained, tmp_path: Path) -> None:
    tokens = trained.windows * SEQ_LENGTH
    found = evaluate(trained, tmp_path / "json", f"held-out={trained.document}", "--max-tokens", str(tokens))
    assert found["held-out"]["tokens"] == tokens
    assert found["held-out"]["loss"] == pytest.approx(series(trained.run, "validation_loss")[-1], abs=1e-5)


def test_micro_batches_are_no_larger_than_the_data(trained: Trained, tmp_path: Path) -> None:
    few = (f"held-out={trained.document}", "--max-tokens", "100")
    sizes = ("1", "1000000000")
    small, large = (evaluate(trained, tmp_path / size, *few, "--micro-batch-size", size) for size in sizes)
    assert large["held-out"]["tokens"] == small["held-out"]["tokens"] == 100
    assert large["held-out"]["loss"] == pytest.approx(small["held-out"]["loss"], abs=1e-5)


@pytest.mark.parametrize("seq_length", [SEQ_LENGTH, 21])
def test_each_domain_has_the_mean_over_its_tokens_each_once(
    seq_length: int, trained: Trained, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"document": trained.document, "code": corpus.b}
    named = (str(data["document"]), f"code={corpus.b}")
    found = evaluate(trained, tmp_path / "json", *named, "--seq-length", str(seq_length), "--micro-batch-size", "3")
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert list(found) == list(data)
    for name, prefix in data.items():
        losses = by_transformers(trained, prefix, seq_length)
        assert len(losses) % seq_length, "the last window is to be filled in part"
        assert found[name]["tokens"] == len(losses) == Index.read(prefix).tokens - 1
        assert found[name]["loss"] == pytest.approx(math.fsum(losses) / len(losses), abs=1e-5)
        assert found[name]["perplexity"] == pytest.approx(math.exp(found[name]["loss"]))
        row = [f"{len(losses):,}", f"{found[name]['loss']:.4f}", f"{found[name]['perplexity']:,.2f}"]
        assert [name, *row] in shown


def test_a_limit_takes_the_first_tokens(trained: Trained, tmp_path: Path) -> None:
    found = evaluate(trained, tmp_path / "json", str(trained.document), "--max-tokens", "70")
    losses = by_transformers(trained, trained.document, SEQ_LENGTH)[:70]
    assert found["document"]["tokens"] == 70
    assert found["document"]["loss"] == pytest.approx(sum(losses) / 70, abs=1e-5)


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_several_processes_find_the_same(launcher: str, trained: Trained, corpus: Corpus, tmp_path: Path) -> None:
    """With the deepspeed launcher they share the experts, too. The number of windows is no multiple of theirs."""
    data = ("--data", str(trained.document), str(corpus.b), "--max-tokens", "500")
    arguments = ("--checkpoint", str(trained.run), *data, "--json", str(tmp_path / "several"))
    if launcher == "deepspeed":
        start = deepspeed_command(Path(), module="megatron_tied.evaluate")[: -len(("--config", "FILE"))]
        command = [*start, *arguments, "--expert-model-parallel-size", "2"]
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command = [*torchrun, "--module", "megatron_tied.evaluate", *arguments]
    done = finish(command)
    assert done.code == 0, done.output
    assert done.output.count("perplexity") == 1
    expected = evaluate(trained, tmp_path / "one", *data[1:])
    several = json.loads((tmp_path / "several").read_text())["domains"]
    for name, row in expected.items():
        assert several[name]["tokens"] == row["tokens"] == 500
        assert several[name]["loss"] == pytest.approx(row["loss"], abs=1e-6)


class TestBadInput:
    @pytest.fixture(autouse=True)
    def _no_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any) -> None:
            raise AssertionError("a model is built")

        monkeypatch.setattr(held_out, "load_model", fail)

    def complaint(self, capsys: pytest.CaptureFixture[str], checkpoint: Path, *arguments: str) -> str:
        assert main(["evaluate", "--checkpoint", str(checkpoint), "--data", *arguments]) == 2
        return capsys.readouterr().err

    def test_no_checkpoint(self, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        told = self.complaint(capsys, tmp_path, str(trained.document))
        assert f"--checkpoint = '{tmp_path}': must be a checkpoint, or a run that has one: " in told
        assert "has no manifest.json" in told

    def test_no_data(self, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        told = self.complaint(capsys, trained.run, str(tmp_path / "a"), f"b={tmp_path / 'b'}")
        assert "2 problems" in told
        assert told.count("must be the prefix of a data set") == 2

    @pytest.mark.parametrize("name", ["", "x="])
    def test_data_without_a_name(self, name: str, trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
        assert f"--data = '{name}': must be PREFIX or NAME=PREFIX" in self.complaint(capsys, trained.run, name)

    def test_data_of_another_tokenizer(
        self, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = write_jsonl(tmp_path / "other.jsonl", [make_text(2000, 3)])
        prepare_data([source], tmp_path / "other", vocab_size=300, workers=1)
        told = self.complaint(capsys, trained.run, str(tmp_path / "other"))
        assert f"--data = '{tmp_path / 'other'}': must have been made with the model's tokenizer" in told

    def test_token_ids_that_the_model_does_not_know(
        self, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name, suffix in (("document", ".bin"), ("document", ".idx")):
            (tmp_path / f"foreign{suffix}").write_bytes(trained.document.with_name(name + suffix).read_bytes())
        ids = np.memmap(tmp_path / "foreign.bin", Index.read(trained.document).dtype, "r+")
        ids[50] = 320
        ids.flush()
        assert "has token id 320, and the model knows those below 320" in self.complaint(
            capsys, trained.run, str(tmp_path / "foreign")
        )

    def test_two_domains_of_one_name(self, trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
        told = self.complaint(capsys, trained.run, str(trained.document), f"document={trained.document}")
        assert told.count("must be the only one of the name document") == 2

    def test_a_json_file_that_cannot_be(self, trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
        told = self.complaint(capsys, trained.run, str(trained.document), "--json", "/nowhere/figures.json")
        assert "--json = '/nowhere/figures.json': must be in a directory that is there" in told

    def test_experts_that_cannot_be_shared(self, trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
        told = self.complaint(capsys, trained.run, str(trained.document), "--expert-model-parallel-size", "2")
        assert "--expert-model-parallel-size = 2: must divide the number of processes, 1" in told
