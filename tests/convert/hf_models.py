"""Tiny random models of each Hugging Face class, saved as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megatron_tied.cli.main import main

VOCABULARY = 96

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 7,
    "pad_token_id": None,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "rms_norm_eps": 1e-6,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "mscale": 0.7,
    "mscale_all_dim": 0.8,
}
# By name: the classes, and what differs from the fields that all have.
MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "olmoe": (
        OlmoeConfig,
        OlmoeForCausalLM,
        {"intermediate_size": 32, "num_experts": 8, "clip_qkv": 2.0, "num_key_value_heads": 2},
    ),
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {
            "moe_intermediate_size": 32,
            "intermediate_size": 48,
            "num_experts": 8,
            "head_dim": 32,
            "num_key_value_heads": 2,
            "norm_topk_prob": True,
            "mlp_only_layers": [2],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
    "deepseek_v2": (
        DeepseekV2Config,
        DeepseekV2ForCausalLM,
        {**_LATENT, "n_shared_experts": 2, "q_lora_rank": None, "routed_scaling_factor": 1.5},
    ),
    "deepseek_v3": (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        {
            **_LATENT,
            "n_shared_experts": 1,
            "q_lora_rank": 24,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": _YARN,
            "num_nextn_predict_layers": 0,
        },
    ),
}
MODELS["qwen3_moe_unnormalised"] = (
    *MODELS["qwen3_moe"][:2],
    MODELS["qwen3_moe"][2] | {"norm_topk_prob": False, "mlp_only_layers": []},
)
# The paper's DeepSeek-style model has OLMoE's body.
MODELS["deepseek_style"] = (*MODELS["olmoe"][:2], MODELS["olmoe"][2] | {"num_experts_per_tok": 6})
MODELS["tied_embeddings"] = (*MODELS["qwen3_moe"][:2], MODELS["qwen3_moe"][2] | {"tie_word_embeddings": True})

LATENT = ("deepseek_v2", "deepseek_v3")


def tiny(name: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model with large random weights, norm gains and expert biases, so that nothing can be left out unnoticed."""
    config_class, model_class, own = MODELS[name]
    model = model_class(config_class(**{**_COMMON, **own, **changes}))
    generator = torch.Generator().manual_seed(seed)
    kept = model.state_dict().keys()
    with torch.no_grad():
        for tensor_name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor_name in kept:
                noise = 0.1 * torch.randn(tensor.shape, generator=generator)
                gain = tensor.ndim == 1 and "bias" not in tensor_name
                tensor.copy_(1 + noise if gain else noise)
    return model.eval()


def save(name: str, directory: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Such a model in `directory`, in several files; DeepSeek's routers stay in float32, as transformers keeps them."""
    model = tiny(name, **changes).to(dtype)
    if name in LATENT:
        for layer in model.model.layers[1:]:
            layer.mlp.gate.float()
    model.save_pretrained(directory, max_shard_size="300KB")
    return directory


def load(directory: Path, **options: Any) -> PreTrainedModel:
    """What transformers makes of a directory, in float32; every weight must have been found."""
    model, loading = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, **options
    )
    assert not any(loading.values()), loading
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """[batch, sequence, vocabulary]"""
    return model(tokens).logits


def some_tokens(seed: int = 0) -> torch.Tensor:
    """Two sequences."""
    return torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(seed))


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory's safetensors files."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, dtypes, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert torch.equal(found[name].flatten().view(torch.uint8), value.flatten().view(torch.uint8)), name


def convert(source: str, target: str, directory: Path, output: Path, *options: str) -> Path:
    """`megatron-tied convert`, which must succeed; without a tokenizer unless `options` say more."""
    arguments = ["convert", "--from", source, "--to", target, "--input", str(directory), "--output", str(output)]
    tokenizer = () if target == "megatron-tied" or "--tokenizer" in options else ("--tokenizer", "none")
    assert main([*arguments, *tokenizer, *options]) == 0
    return output
