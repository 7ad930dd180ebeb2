"""Real published models as fields of ModelConfig.

The sources are named beside each model: its Hugging Face card, whose `config.json` the sizes are those of, and the
report that describes it. Vocabularies are not padded; multi-token prediction modules and the stretching of rotary
embeddings to a longer context (YaRN) are left out. Keys that ModelConfig does not name are Megatron-Core's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Fields = Mapping[str, Any]

_SOFTMAX_OVER_ALL = {"moe_router_pre_softmax": True}  # the chosen weights are not renormalised
_SOFTMAX_OVER_CHOSEN = {"moe_router_pre_softmax": False}  # which equals the renormalised softmax over all
_SIGMOID_AND_BIAS = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}

# allenai/OLMoE-1B-7B-0924; "OLMoE: Open Mixture-of-Experts Language Models" (arXiv:2409.02060).
_OLMOE_1B_7B = {
    **_SOFTMAX_OVER_ALL,
    "vocab_size": 50_304,
    "num_layers": 16,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_query_groups": 16,
    "num_moe_experts": 64,
    "moe_router_topk": 8,
    "moe_ffn_hidden_size": 1024,
    "moe_aux_loss_coeff": 1e-2,
    "qk_layernorm": True,
    "qk_norm_scope": "projection",
    "layernorm_epsilon": 1e-5,
    "rotary_base": 10_000,
}

# "Qwen3 Technical Report" (arXiv:2505.09388).
_QWEN3 = {
    **_SOFTMAX_OVER_CHOSEN,
    "vocab_size": 151_936,
    "kv_channels": 128,
    "num_query_groups": 4,
    "num_moe_experts": 128,
    "moe_router_topk": 8,
    "moe_aux_loss_coeff": 1e-3,
    "qk_layernorm": True,
    "qk_norm_scope": "head",
    "layernorm_epsilon": 1e-6,
    "rotary_base": 1_000_000,
}

# Qwen/Qwen3-30B-A3B
_QWEN3_30B_A3B = {
    **_QWEN3,
    "num_layers": 48,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "moe_ffn_hidden_size": 768,
}

# Qwen/Qwen3-235B-A22B
_QWEN3_235B_A22B = {
    **_QWEN3,
    "num_layers": 94,
    "hidden_size": 4096,
    "num_attention_heads": 64,
    "moe_ffn_hidden_size": 1536,
}

# mistralai/Mixtral-8x7B-v0.1; "Mixtral of Experts" (arXiv:2401.04088).
_MIXTRAL_8X7B = {
    **_SOFTMAX_OVER_CHOSEN,
    "vocab_size": 32_000,
    "num_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "num_moe_experts": 8,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 14_336,
    "moe_aux_loss_coeff": 2e-2,
    "layernorm_epsilon": 1e-5,
    "rotary_base": 1_000_000,
}

# Multi-head latent attention with the widths that all models here share ("DeepSeek-V2", arXiv:2405.04434).
_LATENT_ATTENTION = {
    "multi_latent_attention": True,
    "kv_lora_rank": 512,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
    "kv_channels": 128,
    "rope_type": "rope",
    "qk_layernorm": True,  # of the compressed query and of the compressed key and value
    "layernorm_epsilon": 1e-6,
}

# deepseek-ai/DeepSeek-V2-Lite; "DeepSeek-V2" (arXiv:2405.04434), appendix on DeepSeek-V2-Lite.
_DEEPSEEK_V2_LITE = {
    **_LATENT_ATTENTION,
    **_SOFTMAX_OVER_ALL,
    "vocab_size": 102_400,
    "num_layers": 27,
    "hidden_size": 2048,
    "ffn_hidden_size": 10_944,
    "num_attention_heads": 16,
    "q_lora_rank": None,  # queries are not compressed
    "num_moe_experts": 64,
    "moe_router_topk": 6,
    "moe_ffn_hidden_size": 1408,
    "moe_shared_expert_intermediate_size": 2 * 1408,
    "moe_layer_freq": [0] + [1] * 26,
    "rotary_base": 10_000,
}

# deepseek-ai/DeepSeek-V3; "DeepSeek-V3 Technical Report" (arXiv:2412.19437).
_DEEPSEEK_V3 = {
    **_LATENT_ATTENTION,
    **_SIGMOID_AND_BIAS,
    "vocab_size": 129_280,
    "num_layers": 61,
    "hidden_size": 7168,
    "ffn_hidden_size": 18_432,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "num_moe_experts": 256,
    "moe_router_topk": 8,
    "moe_router_num_groups": 8,
    "moe_router_group_topk": 4,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_ffn_hidden_size": 2048,
    "moe_shared_expert_intermediate_size": 2048,
    "moe_layer_freq": [0] * 3 + [1] * 58,
    "rotary_base": 10_000,
}

# moonshotai/Kimi-K2-Base; "Kimi K2: Open Agentic Intelligence" (arXiv:2507.20534). All experts are one group.
_KIMI_K2 = {
    **_LATENT_ATTENTION,
    **_SIGMOID_AND_BIAS,
    "vocab_size": 163_840,
    "num_layers": 61,
    "hidden_size": 7168,
    "ffn_hidden_size": 18_432,
    "num_attention_heads": 64,
    "q_lora_rank": 1536,
    "num_moe_experts": 384,
    "moe_router_topk": 8,
    "moe_router_topk_scaling_factor": 2.827,
    "moe_ffn_hidden_size": 2048,
    "moe_shared_expert_intermediate_size": 2048,
    "moe_layer_freq": [0] + [1] * 60,
    "rotary_base": 50_000,
}

# openai/gpt-oss-120b; "gpt-oss-120b & gpt-oss-20b Model Card" (arXiv:2508.10925).
_GPT_OSS_120B = {
    **_SOFTMAX_OVER_CHOSEN,
    "vocab_size": 201_088,
    "num_layers": 36,
    "hidden_size": 2880,
    "num_attention_heads": 64,
    "num_query_groups": 8,
    "kv_channels": 64,
    "softmax_type": "learnable",  # attention sinks
    "window_size": [127, 0],  # 128 tokens with the query's own, in every other layer from the first
    "window_attn_skip_freq": 2,
    "num_moe_experts": 128,
    "moe_router_topk": 4,
    "moe_ffn_hidden_size": 2880,
    "expert_backend": "te",  # the one that has biases in experts of one grouped product
    "add_bias_linear": True,
    "activation": "gelu",  # nearest to its x * sigmoid(1.702 x), which approximates GELU
    "glu_linear_offset": 1.0,
    "activation_func_clamp_value": 7.0,
    "layernorm_epsilon": 1e-5,
    "rotary_base": 150_000,
}

PUBLISHED: Mapping[str, Fields] = {
    "olmoe_1b_7b": _OLMOE_1B_7B,
    "qwen3_30b_a3b": _QWEN3_30B_A3B,
    "qwen3_235b_a22b": _QWEN3_235B_A22B,
    "mixtral_8x7b": _MIXTRAL_8X7B,
    "deepseek_v2_lite": _DEEPSEEK_V2_LITE,
    "deepseek_v3": _DEEPSEEK_V3,
    "kimi_k2": _KIMI_K2,
    "gpt_oss_120b": _GPT_OSS_120B,
}
