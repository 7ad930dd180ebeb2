"""A checkpoint's model, whatever its training was told to use, against transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_tied.checkpoint.manifest import Manifest
from megatron_tied.convert import live_model
from megatron_tied.errors import ConfigError
from megatron_tied.inference.loading import find_model, inference_config, load_model
from megatron_tied.models.config import ModelConfig
from megatron_tied.models.gpt import HOST_OPTIONS
from tests.convert.hf_models import convert, load, logits, save, some_tokens
from tests.tiny_model import FIELDS

# What another host, another layout or training alone would have.
ELSEWHERE = {
    "expert_backend": "te",
    "apply_rope_fusion": True,
    "moe_permute_fusion": True,
    "moe_expert_capacity_factor": 0.5,
    "moe_pad_expert_input_to_capacity": True,
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("qwen3_moe_unnormalised", tmp_path_factory.mktemp("original") / "hf")


@pytest.fixture
def imported(original: Path, tmp_path: Path) -> Path:
    return convert("hf", "megatron-tied", original, tmp_path / "imported", "--no-verify")


@torch.no_grad()
def our_logits(checkpoint: Path, **options: str) -> torch.Tensor:
    tokens = some_tokens()
    return load_model(find_model(checkpoint), **options)(tokens, torch.arange(40).expand(2, 40), None)


def test_logits_are_those_of_transformers(one_process: None, original: Path, imported: Path) -> None:
    manifest = Manifest.read(imported)
    run = manifest.run | {
        "model": manifest.run["model"] | ELSEWHERE,
        "tie": manifest.run["tie"] | {"weight_gradient": "fused"},
        "parallel": {"expert_model_parallel_size": 8, "tensor_model_parallel_size": 4},
    }
    dataclasses.replace(manifest, run=run).write(imported)
    expected = logits(load(original), some_tokens())
    torch.testing.assert_close(our_logits(imported), expected, rtol=1e-4, atol=1e-4)
    # What conversions are checked with has experts of one kind, whatever the training asked for.
    checked = live_model.logits(live_model.model_of_checkpoint(imported), some_tokens())
    torch.testing.assert_close(checked, expected, rtol=1e-4, atol=1e-4)


def test_the_precision_is_that_of_the_training_unless_said_otherwise(one_process: None, imported: Path) -> None:
    manifest = Manifest.read(imported)
    run = manifest.run | {"train": manifest.run["train"] | {"precision": "bf16", "seq_length": 77}}
    dataclasses.replace(manifest, run=run).write(imported)
    found = find_model(imported)
    assert (found.precision, found.seq_length) == ("bf16", 77)
    for options, dtype in (({}, torch.bfloat16), ({"precision": "fp32"}, torch.float32)):
        model = load_model(found, **options)
        assert (
            model.output_layer.weight.dtype == model.decoder.layers[0].self_attention.linear_qkv.weight.dtype == dtype
        )
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_checkpoint_that_is_not_complete(imported: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"X = .*: must be a checkpoint, or a run that has one: .*is no directory"):
        find_model(tmp_path / "nowhere", field="X")
    file = next(imported.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"safetensors: is truncated"):
        find_model(imported)


@pytest.mark.parametrize("is_latent", [True, False])
def test_rope_that_latent_attention_fuses_for_training_alone(is_latent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Transformer Engine is."""
    monkeypatch.setitem(HOST_OPTIONS, "apply_rope_fusion", ("Transformer Engine", lambda: True))
    fields = {**FIELDS, "num_query_groups": FIELDS["num_attention_heads"], "qk_norm_scope": "head", "qkv_clip": None}
    config = ModelConfig.resolve({**fields, "multi_latent_attention": is_latent, "apply_rope_fusion": True})
    assert inference_config(config).model_extra["apply_rope_fusion"] is not is_latent
