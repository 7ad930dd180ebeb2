"""Multi-head latent attention and DeepSeek's routers: equal to the Hugging Face classes in logits and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from megatron_tied import ConfigError, ModelConfig, TieConfig, build_gpt_model
from megatron_tied.models.latent_attention import latent_sizes
from tests.oracle.names import to_megatron, to_reference
from tests.oracle.reference import gradients, tiny, weights

pytestmark = pytest.mark.usefixtures("one_process")

VOCABULARY, LENGTH = 96, 24
CLASSES = {
    "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
}
# What both sides are told, in the words of each.
HUGGING_FACE: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 80,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "vocab_size": VOCABULARY,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "rms_norm_eps": 1e-6,
    "pad_token_id": None,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}
OURS: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 64,
    "ffn_hidden_size": 80,
    "moe_ffn_hidden_size": 32,
    "num_attention_heads": 4,
    "num_moe_experts": 8,
    "moe_router_topk": 4,
    "moe_shared_expert_intermediate_size": 64,
    "moe_layer_freq": [0, 1, 1],
    "vocab_size": VOCABULARY,
    "multi_latent_attention": True,
    "kv_lora_rank": 16,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 12,
    "qk_layernorm": True,
    "layernorm_epsilon": 1e-6,
    "moe_router_dtype": "fp32",
}
V2 = {"moe_router_pre_softmax": True}
V3 = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}


def _plain_rope(theta: int) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": float(theta)}}, {
        "rope_type": "rope",
        "rotary_base": theta,
    }


def _yarn(**mscales: float) -> tuple[dict[str, Any], dict[str, Any]]:
    common = {"original_max_position_embeddings": 8, "beta_fast": 16.0, "beta_slow": 1.0, **mscales}
    theirs = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, **common}
    return {"rope_parameters": theirs}, {"rope_type": "yarn", "rotary_scaling_factor": 4.0, **common}


# Per case: the class, its rotary embedding in both languages, and what else each side is told.
CASES: dict[str, tuple[str, tuple[dict[str, Any], dict[str, Any]], dict[str, Any], dict[str, Any]]] = {
    "v2 as in Lite": (
        "deepseek_v2",
        _yarn(mscale=0.707, mscale_all_dim=0.707),
        {"q_lora_rank": None, "routed_scaling_factor": 1.0},
        {"q_lora_rank": None},
    ),
    "v2 with compressed queries": (
        "deepseek_v2",
        _yarn(mscale=1.0, mscale_all_dim=0.4),
        {"q_lora_rank": 24, "routed_scaling_factor": 16.0},
        {"q_lora_rank": 24, "moe_router_topk_scaling_factor": 16.0},
    ),
    "v2 with groups": (
        "deepseek_v2",
        _plain_rope(50_000),
        {
            **{"q_lora_rank": 24, "routed_scaling_factor": 1.5, "topk_method": "group_limited_greedy"},
            **{"n_group": 4, "topk_group": 3, "num_experts_per_tok": 3},
        },
        {
            **{"q_lora_rank": 24, "moe_router_topk_scaling_factor": 1.5},
            **{"moe_router_num_groups": 4, "moe_router_group_topk": 3, "moe_router_topk": 3},
        },
    ),
    "v3": (
        "deepseek_v3",
        _yarn(mscale=1.0, mscale_all_dim=1.0),
        {
            **{"q_lora_rank": 24, "routed_scaling_factor": 2.5, "norm_topk_prob": True},
            **{"n_group": 4, "topk_group": 2},
        },
        {
            **{"q_lora_rank": 24, "moe_router_topk_scaling_factor": 2.5},
            **{"moe_router_num_groups": 4, "moe_router_group_topk": 2},
        },
    ),
    "v3 without groups": (
        "deepseek_v3",
        _plain_rope(10_000),
        {"q_lora_rank": None, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1},
        {"q_lora_rank": None},
    ),
    # Megatron-Core renormalises sigmoid scores unless a token has one expert.
    "v3 not renormalised": (
        "deepseek_v3",
        _plain_rope(10_000),
        {
            **{"q_lora_rank": 24, "routed_scaling_factor": 2.0, "norm_topk_prob": False},
            **{"n_group": 1, "topk_group": 1, "num_experts_per_tok": 1},
        },
        {"q_lora_rank": 24, "moe_router_topk_scaling_factor": 2.0, "moe_router_topk": 1},
    ),
}


def _hugging_face(architecture: str, settings: dict[str, Any]) -> torch.nn.Module:
    config_class, model_class = CLASSES[architecture]
    model = model_class(config_class(**{**HUGGING_FACE, **settings}))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if parameter.ndim == 1 else noise)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.3 * torch.rand(buffer.shape, generator=generator))
    return model.train()


def _built(settings: dict[str, Any], reference: torch.nn.Module) -> torch.nn.Module:
    model = build_gpt_model(ModelConfig.resolve({**OURS, **settings}), TieConfig())
    values, biases = weights(reference), dict(reference.named_buffers())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(to_megatron(tiny("deepseek_v2"), values, name, slice(None)))
        for index, layer in enumerate(model.decoder.layers):
            if getattr(getattr(layer.mlp, "router", None), "expert_bias", None) is not None:
                layer.mlp.router.expert_bias.copy_(biases[f"model.layers.{index}.mlp.gate.e_score_correction_bias"])
    return model


@pytest.fixture(autouse=True)
def _own_loss_tracker() -> Iterator[None]:
    """Megatron-Core sizes its tracker of router losses by the first model that it meets."""
    get_moe_layer_wise_logging_tracker().clear()
    yield
    get_moe_layer_wise_logging_tracker().clear()


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_the_hugging_face_class(case: str) -> None:
    architecture, (their_rope, our_rope), theirs, ours = CASES[case]
    reference = _hugging_face(architecture, {**their_rope, **theirs})
    router = V3 if architecture == "deepseek_v3" else V2
    model = _built({**our_rope, **router, **ours}, reference)
    tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(LENGTH, LENGTH).triu(1).bool()[None, None]
    found = model(tokens, torch.arange(LENGTH).expand_as(tokens), mask)
    expected = reference(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    for logits in (found, expected):
        (logits * direction).mean().backward()
    named = {name: parameter.grad for name, parameter in model.named_parameters()}
    computed, wanted = to_reference(tiny("deepseek_v2"), named), gradients(reference)
    assert computed.keys() == wanted.keys()
    errors = {name: ((computed[name] - value).norm() / value.norm()).item() for name, value in wanted.items()}
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"kv_lora_rank": 0}, "kv_lora_rank"),
        ({"qk_pos_emb_head_dim": 7}, "qk_pos_emb_head_dim"),
        ({"rope_type": "linear"}, "rope_type"),
        ({"rope_type": "rope", "mscale_all_dim": 1.0}, "mscale_all_dim"),
        ({"num_query_groups": 2}, "num_query_groups"),
        ({"qkv_clip": 8.0}, "qkv_clip"),
        ({"qk_norm_scope": "projection"}, "qk_norm_scope"),
        ({"add_qkv_bias": True}, "add_qkv_bias"),
        ({"multi_latent_attention": False}, "kv_lora_rank"),
    ],
)
def test_what_latent_attention_does_not_have_is_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig.resolve({**OURS, **fields})
    assert f"model.{field}" in {problem.field for problem in error.value.problems}


def test_sizes_may_be_left_out_and_queries_not_compressed() -> None:
    shape = {name: OURS[name] for name in ("num_layers", "num_attention_heads", "num_moe_experts")}
    model = ModelConfig.resolve({**shape, "hidden_size": 72, "multi_latent_attention": True, "q_lora_rank": None})
    assert latent_sizes(model) == (None, 512, 128, 64, 128)
