"""Models that were trained here: out to Hugging Face with their tokenizer, untied, and on with training."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from megatron_tied.cli.main import main
from megatron_tied.data.tokenizer import SentencePieceTokenizer
from megatron_tied.errors import ConfigError
from megatron_tied.training.config_file import parse_config
from megatron_tied.training.resume import choose_start
from tests.convert.hf_models import assert_same_bits, convert, load, save, tensors
from tests.training.runs import Corpus, alone_command, config_values, finish, series

MODEL = {"qk_layernorm": True, "moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 0.0}


def train(corpus: Corpus, directory: Path, *overrides: str) -> Path:
    """A run of one process; returns its directory."""
    directory.mkdir()
    values = config_values(corpus, directory / "run")
    values["model"] |= MODEL
    values["parallel"] = {}
    path = directory / "config.json"
    path.write_text(json.dumps(values))
    done = finish(alone_command(path, "train.eval_every=0", "checkpoint.save_every=100", *overrides))
    assert done.code == 0, done.output
    return directory / "run"


@pytest.fixture(scope="module")
def trained(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = ("train.steps=4", "optimizer.lr=0.02", "train.precision=bf16")
    return train(corpus, tmp_path_factory.mktemp("trained") / "a", *options)


def test_untied_training_begins_with_the_same_loss_and_goes_on(corpus: Corpus, trained: Path, tmp_path: Path) -> None:
    untied = convert("megatron-tied", "megatron-tied", trained, tmp_path / "untied", "--tie-group-size", "1")
    on = ("train.steps=3", "optimizer.warmup_steps=0", "data.split=[1,0]")
    begun = {"tied": (f"train.init_from={trained}",), "on": (f"train.init_from={untied}", "tie.group_size=1")}
    with ThreadPoolExecutor() as pool:
        runs = pool.map(lambda name: train(corpus, tmp_path / name, *on, *begun[name]), begun)
    tied_losses, untied_losses = (series(run, "lm_loss") for run in runs)
    assert untied_losses[0] == pytest.approx(tied_losses[0], rel=1e-6)
    assert untied_losses[0] < series(trained, "lm_loss")[0]
    # From then on each layer's experts go their own way.
    assert untied_losses[1] != pytest.approx(tied_losses[1], rel=1e-5)
    assert untied_losses[2] < untied_losses[0]


def test_a_run_is_exported_with_a_tokenizer_that_gives_the_same_ids(
    corpus: Corpus, trained: Path, tmp_path: Path
) -> None:
    arguments = ["convert", "--from", "megatron-tied", "--to", "hf", "--input", str(trained)]
    assert main([*arguments, "--output", str(tmp_path / "plain")]) == 0
    ours, theirs = SentencePieceTokenizer.load(corpus.tokenizer), AutoTokenizer.from_pretrained(tmp_path / "plain")
    for text in ("def f(x):\n    return x", "naïve  漢字🙂", "<|endoftext|> is only text", "x" * 500):
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))
    assert (theirs.eos_token_id, load(tmp_path / "plain").config.eos_token_id) == (ours.eod, ours.eod)
    assert json.loads((tmp_path / "plain" / "generation_config.json").read_text())["eos_token_id"] == ours.eod
    untied = convert("megatron-tied", "hf", trained, tmp_path / "untied", "--tie-group-size", "1")
    assert_same_bits(tensors(untied), tensors(tmp_path / "plain"))
    config = load(tmp_path / "plain").config
    assert (config.max_position_embeddings, config.vocab_size) == (32, 320)


def test_the_precision_of_an_export_is_that_of_the_training_unless_said_otherwise(
    trained: Path, tmp_path: Path
) -> None:
    plain = convert("megatron-tied", "hf", trained, tmp_path / "plain")
    assert {tensor.dtype for tensor in tensors(plain).values()} == {torch.bfloat16}
    retied = convert("megatron-tied", "megatron-tied", trained, tmp_path / "retied", "--tie-group-size", "1")
    assert {tensor.dtype for tensor in tensors(retied).values()} == {torch.float32}
    assert_same_bits(tensors(convert("megatron-tied", "hf", retied, tmp_path / "again")), tensors(plain))
    exact = convert("megatron-tied", "hf", trained, tmp_path / "exact", "--dtype", "fp32")
    assert {tensor.dtype for tensor in tensors(exact).values()} == {torch.float32}
    for name, tensor in tensors(exact).items():
        assert torch.equal(tensors(plain)[name], tensor.bfloat16()), name


def test_an_import_is_what_training_begins_with_by_its_config_file(
    one_process: None, corpus: Corpus, tmp_path: Path
) -> None:
    original = save("qwen3_moe", tmp_path / "original", vocab_size=320)
    options = ("--tie-group-size", "2", "--tie-skip-first", "1", "--tie-skip-last", "1")
    imported = convert("hf", "megatron-tied", original, tmp_path / "imported", *options)
    sections = yaml.safe_load((imported / "config.yaml").read_text())
    values = config_values(corpus, tmp_path / "run") | sections | {"parallel": {}}
    config = parse_config(values | {"train": values["train"] | {"init_from": str(imported)}})
    assert config.topology().describe() == "6 layers: 0 [1 3] 4 5; dense: 2"
    assert not config.problems(world_size=1)
    start = choose_start(config)
    assert start.weights is not None
    assert start.weights.path == imported

    with pytest.raises(ConfigError, match=f"begin a run with them by train.init_from={imported}"):
        choose_start(parse_config(values | {"train": values["train"] | {"resume": str(imported)}}))
