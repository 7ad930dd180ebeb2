"""Import and export give back every bit, and the command's own check agrees on each model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_tied.checkpoint.manifest import Manifest
from tests.convert.hf_models import MODELS, assert_same_bits, convert, load, logits, save, some_tokens, tensors


@pytest.mark.parametrize("name", MODELS)
def test_import_and_export_keep_every_bit(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = save(name, tmp_path / "original")
    imported = convert("hf", "megatron-tied", original, tmp_path / "imported")
    told = capsys.readouterr().out
    assert "largest difference of logits on random tokens" in told
    exported = convert("megatron-tied", "hf", imported, tmp_path / "exported", "--no-verify")
    assert_same_bits(tensors(exported), tensors(original))
    theirs, ours = (json.loads((path / "config.json").read_text()) for path in (original, exported))
    assert ours["model_type"] == theirs["model_type"]
    assert ours["eos_token_id"] == 7
    assert torch.equal(logits(load(exported), some_tokens()), logits(load(original), some_tokens()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_stored_precision_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    original = save("olmoe", tmp_path / "original", dtype=dtype)
    verify = () if dtype == torch.bfloat16 else ("--no-verify",)
    imported = convert("hf", "megatron-tied", original, tmp_path / "imported", *verify)
    assert {tensor.dtype for tensor in Manifest.read(imported).tensors.values()} == {str(dtype).removeprefix("torch.")}
    exported = convert("megatron-tied", "hf", imported, tmp_path / "exported", *verify)
    assert_same_bits(tensors(exported), tensors(original))
    assert load(exported).config.dtype == torch.float32  # as asked for
    widened = convert("megatron-tied", "hf", imported, tmp_path / "widened", "--dtype", "fp32", *verify)
    for tensor_name, tensor in tensors(widened).items():
        assert torch.equal(tensor, tensors(original)[tensor_name].float()), tensor_name


def test_biases_and_mixed_precisions_stay_as_they_are(tmp_path: Path) -> None:
    original = save("deepseek_v3", tmp_path / "original", dtype=torch.bfloat16)
    stored = {tensor.dtype for tensor in tensors(original).values()}
    assert stored == {torch.bfloat16, torch.float32}  # the router's weights and biases are kept in float32
    imported = convert("hf", "megatron-tied", original, tmp_path / "imported", "--no-verify")
    exported = convert("megatron-tied", "hf", imported, tmp_path / "exported", "--no-verify")
    assert_same_bits(tensors(exported), tensors(original))
    rounded = tensors(convert("megatron-tied", "hf", imported, tmp_path / "bf16", "--dtype", "bf16", "--no-verify"))
    assert rounded["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16
    assert rounded["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32


def test_stacked_experts_are_read_like_single_ones(tmp_path: Path) -> None:
    original = save("olmoe", tmp_path / "original")
    single = tensors(original)
    fused = tmp_path / "fused"
    fused.mkdir()
    shutil.copy(original / "config.json", fused)
    state = {name: tensor for name, tensor in single.items() if ".experts." not in name}
    for layer in range(6):
        matrices = {
            kind: torch.stack([single[f"model.layers.{layer}.mlp.experts.{e}.{kind}_proj.weight"] for e in range(8)])
            for kind in ("gate", "up", "down")
        }
        prefix = f"model.layers.{layer}.mlp.experts"
        state[f"{prefix}.gate_up_proj"] = torch.cat([matrices["gate"], matrices["up"]], dim=1)
        state[f"{prefix}.down_proj"] = matrices["down"]
    save_file(state, fused / "model.safetensors")
    imported = convert("hf", "megatron-tied", fused, tmp_path / "imported", "--no-verify")
    exported = convert("megatron-tied", "hf", imported, tmp_path / "exported", "--no-verify")
    assert_same_bits(tensors(exported), single)


def test_our_names_and_packing_are_those_of_megatron(tmp_path: Path) -> None:
    """Written out by hand for one layer: what the round trip alone could not show."""
    original = save("qwen3_moe", tmp_path / "original")
    theirs = tensors(original)
    imported = convert("hf", "megatron-tied", original, tmp_path / "imported", "--no-verify")
    ours = {name.partition("@")[0]: tensor for name, tensor in tensors(imported).items()}
    layer = "weight/decoder.layers.3"
    q, k, v = (theirs[f"model.layers.3.self_attn.{part}_proj.weight"] for part in "qkv")
    # Two query groups of two heads, each 32 wide: the group's queries, its key, its value.
    packed = torch.cat([q[:64], k[:32], v[:32], q[64:], k[32:], v[32:]])
    assert torch.equal(ours[f"{layer}.self_attention.linear_qkv.weight"], packed)
    assert torch.equal(ours[f"{layer}.mlp.experts.up"][5], theirs["model.layers.3.mlp.experts.5.up_proj.weight"])
    dense = [theirs[f"model.layers.2.mlp.{kind}_proj.weight"] for kind in ("gate", "up")]
    assert torch.equal(ours["weight/decoder.layers.2.mlp.linear_fc1.weight"], torch.cat(dense))
    assert torch.equal(
        ours[f"{layer}.pre_mlp_layernorm.weight"], theirs["model.layers.3.post_attention_layernorm.weight"]
    )


def test_a_stored_output_layer_of_tied_embeddings_must_be_the_embedding(tmp_path: Path) -> None:
    original = save("tied_embeddings", tmp_path / "original")
    state = tensors(original)
    for path in original.glob("*.safetensors*"):
        path.unlink()
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, original / "model.safetensors")
    convert("hf", "megatron-tied", original, tmp_path / "imported")
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"] + 1}, original / "model.safetensors")
    with pytest.raises(AssertionError):
        convert("hf", "megatron-tied", original, tmp_path / "again")
