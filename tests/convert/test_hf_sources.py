"""Hugging Face directories read with care: files in doubt, precisions that differ, keys that steer transformers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import OlmoeForCausalLM

from megatron_tied.cli.main import main
from megatron_tied.convert.checkpoint_output import checkpoint_pieces
from megatron_tied.convert.hf_output import hf_pieces
from megatron_tied.convert.hf_source import HuggingFaceSource
from megatron_tied.convert.pieces import total_bytes
from megatron_tied.convert.retied import AverageMerge, RetiedSource
from megatron_tied.convert.self_check import hugging_face_model
from megatron_tied.errors import ConfigError
from megatron_tied.topology import TieConfig
from tests.convert.hf_models import convert, load, logits, save, some_tokens, tensors

INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def olmoe(tmp_path: Path) -> Path:
    return save("olmoe", tmp_path / "olmoe")


def rewritten(directory: Path, change: Callable[[Tensors], Any]) -> Path:
    """The model's tensors after `change`, in one file."""
    found = tensors(directory)
    change(found)
    for path in directory.glob("model*"):
        path.unlink()
    save_file(found, directory / "model.safetensors")
    return directory


def with_keys(directory: Path, **keys: object) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return directory


def test_two_sets_of_weights_are_refused(olmoe: Path) -> None:
    save_file(tensors(olmoe), olmoe / "model.safetensors")
    with pytest.raises(ConfigError, match=f"has both model.safetensors and {INDEX}: take away"):
        HuggingFaceSource(olmoe)


def test_a_tensor_in_two_files_is_refused(olmoe: Path) -> None:
    first, *_, last = sorted(olmoe.glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(last) | {name: tensor + 1}, last)
    with pytest.raises(ConfigError, match=f"has {name} in {last.name} and in {first.name}"):
        HuggingFaceSource(olmoe)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: names.pop("model.norm.weight"), "does not name model.norm.weight, though a file"),
        (
            lambda names: names.update({"model.norm.weight": names["model.embed_tokens.weight"]}),
            "names files for model.norm.weight that do not have",
        ),
        (lambda names: names.update(a=3), "weight_map must give a file's name"),
        (lambda names: names.update(a="x\0y"), "must name files beside it, not 'x"),
        (lambda names: names.update(a=".."), "must name files beside it, not '..'"),
    ],
)
def test_an_index_that_is_wrong_is_refused(change: Callable[[dict[str, Any]], Any], message: str, olmoe: Path) -> None:
    index = json.loads((olmoe / INDEX).read_text())
    change(index["weight_map"])
    (olmoe / INDEX).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=message):
        HuggingFaceSource(olmoe)


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "{", "9" * 5000])
def test_what_is_no_json_object_is_refused(content: str, olmoe: Path) -> None:
    for name in (INDEX, "config.json"):
        (olmoe / name).write_text(content)
        with pytest.raises(ConfigError, match="--input = .*" + name):
            HuggingFaceSource(olmoe)


def test_a_rounded_output_layer_of_tied_embeddings_will_do(tmp_path: Path) -> None:
    directory = save("tied_embeddings", tmp_path / "model")
    embedding = tensors(directory)["model.embed_tokens.weight"]
    rewritten(directory, lambda found: found.update({"lm_head.weight": embedding.bfloat16()}))
    HuggingFaceSource(directory)
    rewritten(directory, lambda found: found.update({"lm_head.weight": embedding.bfloat16() * 2}))
    with pytest.raises(ConfigError, match=r"another lm_head.weight .* \(stored as BF16 and F32\)"):
        HuggingFaceSource(directory)


def test_no_expert_is_rounded_to_the_precision_of_another(olmoe: Path, tmp_path: Path) -> None:
    def rounded(found: Tensors) -> None:
        for name in [name for name in found if ".experts.0." in name or "q_proj" in name]:
            found[name] = found[name].bfloat16()
        # Of one layer, `gate` alone.
        for expert in range(8):
            name = f"model.layers.4.mlp.experts.{expert}.gate_proj.weight"
            found[name] = found[name].bfloat16()

    mixed = tensors(rewritten(olmoe, rounded))
    source = HuggingFaceSource(olmoe)
    assert source.read_experts(1, "up").dtype == source.expert_dtype(1, "up") == torch.float32
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    assert source.dtype(name) == source.read(name).dtype == torch.float32
    for target, options in (("megatron-tied", ()), ("hf", ()), ("hf-compact", ())):
        written = convert("hf", target, olmoe, tmp_path / target, *options)
        back = convert(target.removesuffix("-compact"), "hf", written, tmp_path / f"{target}.back", "--no-verify")
        for key, tensor in tensors(back).items():
            assert torch.equal(tensor.float(), mixed[key].float()), key
    assert source.expert_dtype(4, "gate") == torch.bfloat16
    topology = source.config.topology(TieConfig(banks=(0, 1, 2, 3, 4, 4)))
    tied = RetiedSource(source, topology, AverageMerge())
    assert tied.expert_dtype(5, "gate") == tied.read_experts(5, "gate").dtype == torch.float32


@pytest.mark.parametrize("wanted", [None, torch.bfloat16])
@pytest.mark.parametrize("target", ["megatron-tied", "hf", "hf-compact"])
def test_sizes_are_those_of_what_is_written(target: str, wanted: torch.dtype | None, tmp_path: Path) -> None:
    directory = save("deepseek_v3", tmp_path / "model", dtype=torch.bfloat16)
    rewritten(directory, lambda found: found.update({n: t.float() for n, t in found.items() if "q_a_proj" in n}))
    source = HuggingFaceSource(directory)
    pieces = checkpoint_pieces(source, wanted) if target == "megatron-tied" else None
    pieces = pieces or hf_pieces(source, wanted, compact=target == "hf-compact")
    options = () if wanted is None else ("--dtype", "bf16")
    written = convert("hf", target, directory, tmp_path / "out", "--no-verify", *options)
    found = tensors(written).values()
    assert total_bytes(pieces) == sum(tensor.numel() * tensor.element_size() for tensor in found)
    assert len(Counter(tensor.dtype for tensor in found)) == 2


STEERING = {
    "attn_implementation": "kernels-community/flash-attn",
    "_attn_implementation": "kernels-community/flash-attn",
    "_attn_implementation_internal": "kernels-community/flash-attn",
    "experts_implementation": "foo/bar",
    "_experts_implementation": "foo/bar",
    "dtype": "garbage",
    "torch_dtype": ["x"],
    "return_dict": False,
    "transformers_weights": "other.safetensors",
    "layer_types": ["sliding_attention"] * 6,
    "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
    "output_hidden_states": True,
    "chunk_size_feed_forward": 3,
    "quantization_config": None,
    "_name_or_path": "../../etc",
    "pad_token_id": None,
}


@pytest.mark.parametrize("name", ["olmoe", "qwen3_moe"])
def test_the_check_is_steered_by_no_other_key(name: str, tmp_path: Path) -> None:
    directory = save(name, tmp_path / "model")
    expected = logits(load(directory, attn_implementation="eager"), some_tokens())
    with_keys(directory, **STEERING)
    for file, content in (("adapter_config.json", {"peft_type": "LORA"}), ("generation_config.json", {"x": 1})):
        (directory / file).write_text(json.dumps(content))
    model = hugging_face_model(directory)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(logits(model, some_tokens()), expected)
    convert("hf", "megatron-tied", directory, tmp_path / "out")


def test_the_check_reads_what_the_file_says_with_other_eyes(olmoe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake in our reading must not become one of the other side as well."""
    before = logits(hugging_face_model(olmoe), some_tokens())
    with_keys(olmoe, clip_qkv=0.01, rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    theirs = logits(load(olmoe, attn_implementation="eager"), some_tokens())
    assert not torch.allclose(theirs, before)
    assert torch.equal(logits(hugging_face_model(olmoe), some_tokens()), theirs)


@pytest.mark.parametrize("step", ["from_pretrained", "forward"])
def test_what_transformers_refuses_is_told(
    step: str, olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusing(*arguments: object, **options: object) -> None:
        raise RuntimeError("index out\nof range")

    monkeypatch.setattr(OlmoeForCausalLM, step, refusing)
    arguments = ["convert", "--from", "hf", "--to", "megatron-tied", "--input", str(olmoe)]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    told = f"{olmoe} cannot be checked, since transformers refuses it: RuntimeError: index out of range"
    assert told in capsys.readouterr().err
    assert main([*arguments, "--output", str(tmp_path / "out"), "--no-verify"]) == 0


def test_numbers_that_are_not_finite_are_told_by_name(
    olmoe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(found: Tensors) -> None:
        found["model.norm.weight"][3] = float("nan")
        found["model.layers.2.mlp.experts.1.up_proj.weight"][0, 0] = float("inf")

    rewritten(olmoe, broken)
    arguments = ["convert", "--from", "hf", "--to", "megatron-tied", "--input", str(olmoe)]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    names = "decoder.final_layernorm.weight, decoder.layers.2.mlp.experts.up"
    assert f"has numbers that are not finite, in {names}; --no-verify" in told
    assert not (tmp_path / "out").exists()
    rounded = [*arguments, "--output", str(tmp_path / "out"), "--dtype", "fp16"]
    assert main(rounded) == 2
    assert "not finite, or too large for --dtype fp16, in decoder" in capsys.readouterr().err
    out = convert("hf", "hf", olmoe, tmp_path / "out", "--no-verify")
    assert "warning: " in (said := capsys.readouterr().out)
    assert "in model.norm.weight, model.layers.2.mlp.experts.1.up_proj.weight" in said
    assert tensors(out)["model.norm.weight"][3].isnan()
