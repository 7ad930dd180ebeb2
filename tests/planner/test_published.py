"""Presets of published models against the Hugging Face classes, and against the totals that were published."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_tied.models.config import ModelConfig
from megatron_tied.models.published import PUBLISHED
from megatron_tied.planner.parameters import count_parameters
from megatron_tied.topology import TieConfig

# From the config.json of each model's card, written out here so that a wrong number in a preset has something to
# differ from. Without DeepSeek-V3's multi-token prediction module, which the totals below do not count either.
HUGGING_FACE: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe_1b_7b": (
        "Olmoe",
        {
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "router_aux_loss_coef": 0.01,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "clip_qkv": None,
        },
    ),
    "qwen3_30b_a3b": (
        "Qwen3Moe",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "router_aux_loss_coef": 0.001,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
        },
    ),
    "qwen3_235b_a22b": (
        "Qwen3Moe",
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "router_aux_loss_coef": 0.001,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
        },
    ),
    "mixtral_8x7b": (
        "Mixtral",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.02,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
        },
    ),
    "deepseek_v2_lite": (
        "DeepseekV2",
        {
            "vocab_size": 102400,
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 27,
            "first_k_dense_replace": 1,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
            "norm_topk_prob": False,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "vocab_size": 129280,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 61,
            "num_nextn_predict_layers": 0,
            "first_k_dense_replace": 3,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
        },
    ),
    "kimi_k2": (
        "DeepseekV3",
        {
            "vocab_size": 163840,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 61,
            "num_nextn_predict_layers": 0,
            "first_k_dense_replace": 1,
            "num_attention_heads": 64,
            "num_key_value_heads": 64,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_routed_experts": 384,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 2.827,
            "norm_topk_prob": True,
            "rms_norm_eps": 1e-6,
            "rope_theta": 50000.0,
        },
    ),
    "gpt_oss_120b": (
        "GptOss",
        {
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 36,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "attention_bias": True,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
            "swiglu_limit": 7.0,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150000.0,
        },
    ),
}

TOTALS = {
    "olmoe_1b_7b": 6.919e9,
    "qwen3_30b_a3b": 30.53e9,
    "qwen3_235b_a22b": 235.09e9,
    "mixtral_8x7b": 46.70e9,
    "deepseek_v2_lite": 15.71e9,
    "deepseek_v3": 671.03e9,
    "kimi_k2": 1.026e12,  # the weights on the hub; the report rounds to 1.04e12
    "gpt_oss_120b": 116.83e9,
}


def total(preset: str, group_size: int = 1) -> int:
    model = ModelConfig.resolve({"preset": preset})
    return count_parameters(model, model.topology(TieConfig(group_size=group_size))).total


def test_every_preset_is_checked():
    assert PUBLISHED.keys() == HUGGING_FACE.keys() == TOTALS.keys()


@pytest.mark.parametrize("preset", PUBLISHED)
def test_equals_the_hugging_face_model(preset):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    name, values = HUGGING_FACE[preset]
    config = getattr(transformers, f"{name}Config")(**values, tie_word_embeddings=False)
    with torch.device("meta"):
        reference = getattr(transformers, f"{name}ForCausalLM")(config)
    # The biases of sigmoid routers are buffers there too, and so in neither sum.
    assert total(preset) == sum(p.numel() for p in reference.parameters())


@pytest.mark.parametrize("preset", PUBLISHED)
def test_total_is_the_published_one(preset):
    assert total(preset) == pytest.approx(TOTALS[preset], rel=5e-3)


@pytest.mark.parametrize(("preset", "expected"), [("qwen3_30b_a3b", 10.6e9), ("deepseek_v3", 220e9)])
def test_tied_totals(preset, expected):
    assert total(preset, group_size=4) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_what_no_parameter_shows(preset):
    model, (_, values) = ModelConfig.resolve({"preset": preset}), HUGGING_FACE[preset]
    extra = model.model_extra
    assert model.moe_router_topk == values["num_experts_per_tok"]
    assert (model.layernorm_epsilon, model.rotary_base) == (values["rms_norm_eps"], values["rope_theta"])
    assert model.moe_aux_loss_coeff == values.get("router_aux_loss_coef", 0)
    assert model.qkv_clip == values.get("clip_qkv")
    if model.moe_router_score_function == "softmax":
        assert model.moe_router_pre_softmax is not values.get("norm_topk_prob", True)
    else:
        assert (model.moe_router_enable_expert_bias, values["norm_topk_prob"]) == (True, True)
    # One group of experts out of one is no grouping.
    groups = (extra.get("moe_router_num_groups", 1), extra.get("moe_router_group_topk", 1))
    assert groups == (values.get("n_group", 1), values.get("topk_group", 1))
    assert extra.get("moe_router_topk_scaling_factor", 1) == values.get("routed_scaling_factor", 1)
    if "sliding_window" in values:
        assert extra["window_size"] == [values["sliding_window"] - 1, 0]
    assert extra.get("activation_func_clamp_value") == values.get("swiglu_limit")


@pytest.mark.filterwarnings("ignore:full scope is deprecated", "ignore:Using a large number of experts")
@pytest.mark.parametrize("preset", PUBLISHED)
def test_megatron_core_knows_the_fields(preset):
    configs = pytest.importorskip("megatron.core.transformer.transformer_config")
    model = ModelConfig.resolve({"preset": preset})
    latent = (model.model_extra or {}).get("multi_latent_attention")
    kwargs = model.transformer_kwargs()
    config = (configs.MLATransformerConfig if latent else configs.TransformerConfig)(**kwargs)
    assert {name: getattr(config, name) for name in kwargs} == kwargs
