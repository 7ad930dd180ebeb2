"""`--tie-method matched`: what it finds on text, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from megatron_tied.cli.main import main
from megatron_tied.convert import live_model
from megatron_tied.convert.calibration import calibration_tokens
from megatron_tied.convert.hf_source import HuggingFaceSource
from megatron_tied.convert.matched import match
from megatron_tied.convert.sources import CheckpointSource
from megatron_tied.errors import ConfigError
from megatron_tied.inference.processes import one_process
from megatron_tied.layers.moe_layer import tied_layers
from megatron_tied.topology import TieConfig
from tests.convert.hf_models import VOCABULARY, convert, load, logits, save, some_tokens, tiny
from tests.training.runs import Corpus


def write_tokens(prefix: Path, tokens: np.ndarray) -> Path:
    """A data set of one document, as Megatron's own tools write it."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    builder.add_item(torch.from_numpy(tokens))
    builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 4096, dtype=np.int32)
    return write_tokens(tmp_path_factory.mktemp("text") / "text", tokens)


def shuffled(name: str, directory: Path, orders: dict[int, torch.Tensor]) -> tuple[PreTrainedModel, Path]:
    """A model whose tied layers have the same experts, and the same in `directory`, with experts in other places."""
    model = tiny(name)
    layers = model.model.layers
    groups = {2: 1, 3: 1, 5: 4}
    with torch.no_grad():
        for layer, owner in groups.items():
            for own, first in zip(
                layers[layer].mlp.experts.parameters(), layers[owner].mlp.experts.parameters(), strict=True
            ):
                own.copy_(first)
        moved = tiny(name)
        moved.load_state_dict(model.state_dict())
        for layer, order in orders.items():
            mlp = moved.model.layers[layer].mlp
            for tensor in (*mlp.experts.parameters(), mlp.gate.weight):
                tensor.copy_(tensor[order].clone())
            if name == "deepseek_v3":
                mlp.gate.e_score_correction_bias.copy_(mlp.gate.e_score_correction_bias[order].clone())
    moved.save_pretrained(directory)
    return model, directory


BANKS = {"olmoe": (0, 1, 1, 1, 2, 2), "deepseek_v3": (1, 1, 1, 2, 2)}
# Of DeepSeek-V3's four groups with two experts each.
WITHIN_GROUPS = {2: torch.tensor([6, 7, 1, 0, 3, 2, 4, 5]), 5: torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])}
ANYHOW = {2: torch.tensor([3, 0, 6, 1, 7, 2, 5, 4]), 3: torch.tensor([1, 2, 3, 4, 5, 6, 7, 0])}


@pytest.mark.parametrize(("name", "orders"), [("olmoe", ANYHOW), ("deepseek_v3", WITHIN_GROUPS)])
def test_experts_in_other_places_are_found_again(
    name: str, orders: dict[int, torch.Tensor], text: Path, tmp_path: Path
) -> None:
    model, directory = shuffled(name, tmp_path / "shuffled", orders)
    source = HuggingFaceSource(directory)
    expected = logits(model, some_tokens())
    torch.testing.assert_close(logits(load(directory), some_tokens()), expected, rtol=1e-5, atol=1e-5)

    merge = match(source, source.config.topology(TieConfig(banks=BANKS[name])), text, tmp_path, longest=128)
    assert merge.orders.keys() == orders.keys()
    for layer, order in orders.items():
        assert torch.equal(merge.orders[layer], order.argsort())

    options = ("--tie-banks", ",".join(map(str, BANKS[name])), "--tie-method", "matched", "--calibration", str(text))
    tied = convert("hf", "megatron-tied", directory, tmp_path / "tied", *options)
    bank = CheckpointSource(tied)
    for layer in orders:
        gate = model.model.layers[layer].mlp.gate
        assert torch.equal(bank.read(f"decoder.layers.{layer}.mlp.router.weight"), gate.weight)
        if name == "deepseek_v3":
            assert torch.equal(
                bank.read(f"decoder.layers.{layer}.mlp.router.expert_bias"), gate.e_score_correction_bias
            )
    plain = convert("megatron-tied", "hf", tied, tmp_path / "plain")
    torch.testing.assert_close(logits(load(plain), some_tokens()), expected, rtol=1e-5, atol=1e-5)


def test_it_is_the_same_every_time_and_nearer_than_as_they_stand(text: Path, tmp_path: Path) -> None:
    source = HuggingFaceSource(save("qwen3_moe_unnormalised", tmp_path / "model"))
    topology = source.config.topology(TieConfig(group_size=2, skip_first=1, skip_last=1))
    said: list[str] = []
    merges = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        merges.append(match(source, topology, text, tmp_path / name, longest=128, say=said.append))
    first, second = merges
    assert said[:2] == said[2:]
    assert [line.split(":")[0] for line in said[:2]] == ["layer 2", "layer 4"]
    for layer in (2, 4):
        assert torch.equal(first.orders[layer], second.orders[layer])
        for kind in ("gate", "up", "down"):
            experts = (merge.experts(source, topology.bank(layer), kind) for merge in merges)
            assert torch.equal(*experts)
    for line in said:
        before, after = (float(part.split()[0]) for part in line.split("layer")[-1].split(": ")[1].split(", "))
        assert after < before


def test_experts_that_are_the_same_keep_their_bits(text: Path, tmp_path: Path) -> None:
    """Layers 1 and 2 share a bank already."""
    options = ("--tie-banks", "0,1,1,2,3,4")
    once = convert("hf", "megatron-tied", save("olmoe", tmp_path / "model"), tmp_path / "once", *options)
    matched = ("--tie-banks", "0,1,1,2,2,3", "--tie-method", "matched", "--calibration", str(text))
    again = convert("megatron-tied", "megatron-tied", once, tmp_path / "again", *matched)
    before, after = (load_file(next(path.glob("*.safetensors"))) for path in (once, again))
    kept = [name for name in before if "layers.1.mlp.experts" in name]
    assert kept
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert CheckpointSource(again).topology.describe() == "6 layers: 0 [1 2] [3 4] 5"


def test_the_disk_must_hold_merged_banks_beside_the_result(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[int] = []
    monkeypatch.setattr("megatron_tied.convert.convert.check_space", lambda path, size: needed.append(size))
    model = save("olmoe", tmp_path / "model")
    for method, more in (("owner", ()), ("matched", ("--calibration", str(text)))):
        options = ("--tie-banks", "0,1,1,2,2,3", "--tie-method", method, *more)
        convert("hf", "megatron-tied", model, tmp_path / method, *options)
    plain, matched = needed
    # Two banks of 8 experts with three matrices of 32 by 64 numbers.
    assert matched - plain == 2 * 8 * 3 * 32 * 64 * 4


def test_text_goes_through_each_layer_in_parts_with_its_experts_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = HuggingFaceSource(save("deepseek_v3", tmp_path / "model"))
    tokens = torch.randint(VOCABULARY, (6, 20), generator=torch.Generator().manual_seed(0))
    expected: dict[int, tuple[torch.Tensor, ...]] = {}
    read: list[int] = []
    put, sizes = live_model.put_experts, set()
    with one_process():
        model = live_model.model_of(source)
        for layer in tied_layers(model):
            layer.router.register_forward_hook(
                lambda _, given, made, at=layer.layer_index: expected.update({at: (given[0].flatten(0, 1), *made)})
            )
        live_model.logits(model, tokens)
        monkeypatch.setattr(live_model, "_TOGETHER", 50)
        monkeypatch.setattr(
            live_model, "put_experts", lambda layer, *rest: [read.append(layer.layer_index), put(layer, *rest)]
        )
        model = live_model.model_of_one_bank(source)
        for layer in tied_layers(model):
            layer.register_forward_pre_hook(lambda _, given: sizes.add(given[0].shape[1]))
        found = {at.layer.layer_index: at[1:] for at in live_model.routed(model, source, tokens, (2, 3, 5))}
    assert read == [1, 2, 3, 4, 5]
    assert sizes == {2}
    assert found.keys() == {2, 3, 5}
    for layer, made in found.items():
        for own, theirs in zip(made, expected[layer], strict=True):
            torch.testing.assert_close(own, theirs)


def test_too_little_memory_is_told_before_the_model_is_built(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megatron_tied.convert.memory._available_memory", lambda: 1_000_000)
    model = save("olmoe", tmp_path / "model")
    arguments = ["convert", "--from", "hf", "--to", "megatron-tied", "--input", str(model)]
    arguments += ["--output", str(tmp_path / "out"), "--tie-group-size", "2"]
    assert main([*arguments, "--tie-method", "matched", "--calibration", str(text)]) == 2
    told = capsys.readouterr().err
    assert "--tie-method = 'matched': it needs some 0.0 GB of memory and 0.0 GB are available: take a smaller" in told
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_calibration_text_is_spread_over_the_data(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "count", np.arange(1000, dtype=np.int32))
    found = calibration_tokens(prefix, tokens=200, length=50, vocab_size=1000)
    assert found.shape == (4, 50)
    assert torch.equal(found, found[:, :1] + torch.arange(50))
    assert len(set(found[:, 0].tolist())) == 4
    assert torch.equal(found, calibration_tokens(prefix, tokens=200, length=50, vocab_size=1000))
    assert calibration_tokens(prefix, tokens=10**9, length=50, vocab_size=1000).shape == (20, 50)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.full(100, 95, np.int32), "must have at least 128 tokens, not 100"),
        (np.full(300, 96, np.int32), "has token id 96, and the model knows those below 96"),
    ],
)
def test_text_of_small_documents_or_foreign_ids(tokens: np.ndarray, message: str, tmp_path: Path) -> None:
    source = HuggingFaceSource(save("olmoe", tmp_path / "model"))
    topology = source.config.topology(TieConfig(banks=BANKS["olmoe"]))
    with pytest.raises(ConfigError, match=message):
        match(source, topology, write_tokens(tmp_path / "text", tokens), tmp_path, longest=128)


def test_text_of_another_tokenizer(corpus: Corpus) -> None:
    with pytest.raises(ConfigError, match="was made for 320 token ids, and the model has 96"):
        calibration_tokens(corpus.a, tokens=100, length=10, vocab_size=VOCABULARY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tie-group-size", "2", "--tie-method", "matched"), "--calibration = None: must be given"),
        (("--tie-method", "matched", "--calibration", "x"), "must come with --tie-group-size or --tie-banks"),
        (("--tie-group-size", "2", "--calibration", "x"), "is for --tie-method matched"),
        (("--tie-group-size", "2", "--calibration-tokens", "9"), "is for --tie-method matched"),
        (("--tie-group-size", "2", "--tie-method", "matched", "--calibration", "no/such"), "must be the prefix of a"),
    ],
)
def test_options_that_do_not_fit(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save("olmoe", tmp_path / "model")
    arguments = ["convert", "--from", "hf", "--to", "megatron-tied", "--input", str(model)]
    assert main([*arguments, "--output", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
