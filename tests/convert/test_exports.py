"""Tied models out: plain for stock classes, compact with experts shared in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megatron_tied.checkpoint.weights import WeightReader
from megatron_tied.convert import hf_output, modeling_megatron_tied
from megatron_tied.errors import ConfigError
from megatron_tied.topology import TieConfig
from tests.convert.hf_models import LATENT, assert_same_bits, convert, load, logits, save, some_tokens, tensors, tiny
from tests.tiny_model import model_config

BANKS = (0, 1, 1, 2, 1, 3)
GROUP = (1, 2, 4)


@pytest.fixture(autouse=True)
def module_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code of models goes nowhere else."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def averaged(model: PreTrainedModel) -> PreTrainedModel:
    """The model whose layers of `GROUP` all have the mean of their experts."""
    experts = [model.model.layers[layer].mlp.experts for layer in GROUP]
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            mean = torch.stack([getattr(module, name) for module in experts]).mean(0)
            for module in experts:
                getattr(module, name).copy_(mean)
    return model


def first_moe_layer(name: str) -> int:
    """DeepSeek's first layer is dense."""
    return 1 if name in LATENT else 0


def tied_checkpoint(name: str, directory: Path, **changes: object) -> Path:
    """A model tied by `BANKS`, imported."""
    original = save(name, directory / "original", **changes)
    banks = ",".join(map(str, BANKS[first_moe_layer(name) :]))
    return convert("hf", "megatron-tied", original, directory / "tied", "--tie-banks", banks)


def experts_of(model: PreTrainedModel, layer: int) -> tuple[int, int]:
    """Where the experts of a layer lie in memory."""
    experts = model.model.layers[layer].mlp.experts
    return experts.gate_up_proj.data_ptr(), experts.down_proj.data_ptr()


@pytest.mark.parametrize("name", ["olmoe", "qwen3_moe_unnormalised", "deepseek_v2", "deepseek_v3"])
def test_a_tied_model_has_the_same_logits_plain_and_compact(name: str, tmp_path: Path) -> None:
    expected = logits(averaged(tiny(name)), some_tokens())
    tied = tied_checkpoint(name, tmp_path)
    plain = load(convert("megatron-tied", "hf", tied, tmp_path / "plain"))
    torch.testing.assert_close(logits(plain, some_tokens()), expected, rtol=1e-5, atol=1e-5)

    compact_directory = convert("megatron-tied", "hf-compact", tied, tmp_path / "compact")
    compact = load(compact_directory, trust_remote_code=True)
    # Not bit for bit: where weights lie decides which kernel BLAS takes.
    torch.testing.assert_close(logits(compact, some_tokens()), logits(plain, some_tokens()), rtol=1e-5, atol=1e-5)
    unique = sum(torch.Size(shape).numel() for shape in WeightReader(tied).shapes().values())
    assert compact.num_parameters() == unique < plain.num_parameters()

    compact.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", trust_remote_code=True)
    torch.testing.assert_close(logits(again, some_tokens()), logits(compact, some_tokens()), rtol=1e-5, atol=1e-5)
    for model in (compact, again, again.to(torch.bfloat16)):
        places = {layer: experts_of(model, layer) for layer in range(first_moe_layer(name), 6)}
        assert len(set(places.values())) == len(places) - 2
        assert places[1] == places[2] == places[4]
        assert model.num_parameters() == unique
    assert_same_bits(tensors(tmp_path / "saved"), tensors(compact_directory))


def test_a_compact_model_never_has_a_stock_type(tmp_path: Path) -> None:
    compact = convert("megatron-tied", "hf-compact", tied_checkpoint("olmoe", tmp_path), tmp_path / "compact")
    config = json.loads((compact / "config.json").read_text())
    assert config["model_type"] == "megatron_tied_olmoe"
    assert config["architectures"] == ["MegatronTiedOlmoeForCausalLM"]
    with pytest.raises((KeyError, ValueError), match="megatron_tied_olmoe"):
        AutoConfig.for_model(config["model_type"])
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(compact, trust_remote_code=False)


def test_a_compact_class_asks_for_banks() -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "num_experts": 8, "vocab_size": 8}
    config = modeling_megatron_tied.MegatronTiedOlmoeConfig(**sizes, num_attention_heads=1, num_key_value_heads=1)
    with pytest.raises(ValueError, match="expert_banks"):
        modeling_megatron_tied.MegatronTiedOlmoeForCausalLM(config)


def test_a_compact_model_can_be_read_back(tmp_path: Path) -> None:
    tied = tied_checkpoint("qwen3_moe_unnormalised", tmp_path)
    compact = convert("megatron-tied", "hf-compact", tied, tmp_path / "compact")
    again = convert("hf", "megatron-tied", compact, tmp_path / "again")
    assert_same_bits(tensors(again), tensors(tied))
    plain = convert("hf", "hf", compact, tmp_path / "plain")
    assert_same_bits(tensors(plain), tensors(convert("megatron-tied", "hf", tied, tmp_path / "direct")))


def wider(directory: Path) -> Path:
    """A compact directory of a model whose tied layers have 12 experts in place of 8."""
    stock = tiny("olmoe").config
    fields = {key: value for key, value in stock.to_dict().items() if key not in ("model_type", "architectures")}
    config = modeling_megatron_tied.MegatronTiedOlmoeConfig(**fields, expert_banks=list(BANKS), num_tied_experts=12)
    torch.manual_seed(0)
    modeling_megatron_tied.MegatronTiedOlmoeForCausalLM(config).save_pretrained(directory)
    return directory


def test_wider_tied_layers_travel_compact_and_are_refused_plain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = wider(tmp_path / "original")
    imported = convert("hf", "megatron-tied", original, tmp_path / "imported")
    assert WeightReader(imported).shapes()["decoder.layers.1.mlp.experts.up"] == (12, 32, 64)
    compact = convert("megatron-tied", "hf-compact", imported, tmp_path / "compact")
    assert_same_bits(tensors(compact), tensors(original))
    loaded = load(compact, trust_remote_code=True)
    assert loaded.model.layers[4].mlp.experts.down_proj.shape == (12, 64, 32)
    assert loaded.model.layers[5].mlp.gate.weight.shape == (8, 64)
    matched = ("--tie-group-size", "2", "--tie-method", "matched", "--calibration", "text")
    for target, options in (("hf", ()), ("megatron-tied", ("--tie-group-size", "1")), ("megatron-tied", matched)):
        with pytest.raises(AssertionError):
            convert("megatron-tied", target, imported, tmp_path / "refused", *options)
        told = capsys.readouterr().err
        assert "tie.num_tied_experts = " in told
    assert not (tmp_path / "refused").exists()


def test_a_narrow_untied_model_is_refused() -> None:
    config = model_config(max_position_embeddings=64)
    narrow, whole = (config.topology(TieConfig(num_tied_experts=experts)) for experts in (4, 8))
    for write in (hf_output.plain_config, hf_output.compact_config):
        assert write(config, whole)
        with pytest.raises(ConfigError, match=r"tie\.num_tied_experts = 4: cannot be exported"):
            write(config, narrow)


def test_what_vllm_computes_otherwise_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = save("olmoe", tmp_path / "original", rms_norm_eps=1e-6, norm_topk_prob=True)
    convert("hf", "hf", original, tmp_path / "copy", "--no-verify")
    told = capsys.readouterr().out
    for warning in ("does not clip", "an epsilon of 1e-5", "does not renormalise"):
        assert f"warning: vLLM's OLMoE {'has ' if 'epsilon' in warning else ''}{warning}" in told
    qwen = save("qwen3_moe", tmp_path / "qwen")
    convert("hf", "hf", qwen, tmp_path / "qwen_copy", "--no-verify")
    assert "vLLM" not in capsys.readouterr().out


def test_a_model_without_a_stock_class_is_refused() -> None:
    from megatron_tied.convert.architectures import architecture_of

    config = model_config(max_position_embeddings=64)
    assert architecture_of(config).write(config)["model_type"] == "qwen3_moe"
    for changes, field in (
        ({"qk_layernorm": False}, "model.qk_layernorm"),
        ({"qkv_clip": 4.0}, "model.qkv_clip"),
        ({"rotary_percent": 0.5}, "model.rotary_percent"),
        ({"normalization": "LayerNorm"}, "model.normalization"),
        ({"activation": "gelu"}, "model.activation"),
        ({"moe_shared_expert_intermediate_size": 32}, "model.moe_shared_expert_intermediate_size"),
        ({"moe_router_num_groups": 2, "moe_router_group_topk": 1}, "model.moe_router_group_topk"),
        ({"window_size": [3, 0]}, "model.window_size"),
    ):
        other = model_config(max_position_embeddings=64, **changes)
        with pytest.raises(ConfigError, match=field.replace(".", r"\.")):
            architecture_of(other).write(other)
