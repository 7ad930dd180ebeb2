"""The planner's list of parameters against models that are really built, on the meta device where they are large."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import megatron_tied as mt
from megatron_tied.models import gpt
from megatron_tied.models.presets import PRESETS
from megatron_tied.planner.parameters import count_parameters
from megatron_tied.planner.tensors import model_tensors

TIED = mt.TieConfig(group_size=4)


def _named(preset: str) -> mt.ModelConfig:
    name, _, scale = preset.partition(":")
    return mt.ModelConfig.resolve({"preset": name, **({"scale": scale} if scale else {})})


# Attention sinks cannot be built here: see test_published.py for those.
BUILDABLE = [
    f"{name}:{scale}" if scale else name
    for name, preset in PRESETS.items()
    for scale in (preset.scales or [None])
    if name != "gpt_oss_120b"
]
SMALL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 32,
    "vocab_size": 96,
}


# As the presets' widths tie them: attention and routers too, an untied model that is narrow between its ends.
MODES = {
    "attention": mt.TieConfig(group_size=4, share="experts_attention"),
    "all": mt.TieConfig(group_size=2, pattern="cyclic", block_size=2, share="all"),
    "narrow": mt.TieConfig(num_tied_experts=8),
}
pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(autouse=True)
def _without_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are none on the meta device."""
    monkeypatch.setattr(gpt, "initialize_weights", lambda *_: None)


def _sizes(model: mt.ModelConfig, tie: mt.TieConfig) -> list[int]:
    with torch.device("meta"):
        built = mt.build_gpt_model(model, tie, precision="bf16")
    return [parameter.numel() for parameter in built.parameters()]


@pytest.mark.parametrize("tie", [mt.TieConfig(), TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("preset", BUILDABLE)
def test_presets_have_the_parameters_that_are_planned(preset: str, tie: mt.TieConfig) -> None:
    model = _named(preset)
    topology = model.topology(tie)
    sizes = _sizes(model, tie)
    assert [tensor.numel for tensor in model_tensors(model, topology, model.vocab_size)] == sizes
    assert count_parameters(model, topology).total == sum(sizes)


@pytest.mark.parametrize("tie", MODES.values(), ids=MODES)
@pytest.mark.parametrize("preset", ["olmoe:tiny", "qwen3_moe:tiny"])
def test_modes_have_the_parameters_that_are_planned(preset: str, tie: mt.TieConfig) -> None:
    test_presets_have_the_parameters_that_are_planned(preset, tie)


@pytest.mark.parametrize("share", ["experts", "experts_attention", "all"])
@pytest.mark.parametrize(
    "fields",
    [
        {"moe_layer_freq": [0, 1, 1, 1], "moe_shared_expert_intermediate_size": 48, "moe_shared_expert_gate": True},
        {"add_bias_linear": True, "expert_backend": "sequential", "normalization": "LayerNorm"},
        {"add_qkv_bias": True, "share_embeddings_and_output_weights": True, "gated_linear_unit": False},
        {"qk_layernorm": True, "qk_norm_scope": "projection"},
        {"multi_latent_attention": True, "num_query_groups": 4, "q_lora_rank": None, "rope_type": "yarn"},
        {
            **{"multi_latent_attention": True, "num_query_groups": 4, "qk_layernorm": True, "add_bias_linear": True},
            "expert_backend": "sequential",
        },
    ],
)
def test_options_add_the_parameters_that_are_planned(fields: dict[str, Any], share: str) -> None:
    model = mt.ModelConfig.resolve({**SMALL, **fields})
    tie = mt.TieConfig(group_size=2, skip_first=1, skip_last=0, share=share)
    topology = model.topology(tie)
    planned = [
        size for tensor in model_tensors(model, topology, model.vocab_size) for size in [tensor.numel] * tensor.copies
    ]
    # Experts of their own stand one after the other, first and second matrix by turns.
    in_order = sorted if model.expert_backend == "sequential" else list
    assert in_order(planned) == in_order(_sizes(model, tie))
