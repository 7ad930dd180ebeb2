"""The closed formula against published totals, hand-worked cases and the Hugging Face model classes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_tied.errors import ConfigError
from megatron_tied.models.config import ModelConfig
from megatron_tied.planner.parameters import ParameterCount, count_parameters
from megatron_tied.topology import TieConfig

SMALL = {
    "num_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "num_moe_experts": 4,
    "ffn_hidden_size": 48,
    "moe_ffn_hidden_size": 16,
    "vocab_size": 100,
}


def count(tie: TieConfig | None = None, **fields: object) -> ParameterCount:
    model = ModelConfig.resolve(fields)
    return count_parameters(model, model.topology(tie or TieConfig()))


@pytest.mark.parametrize(
    ("preset", "scale", "group_size", "width", "expected"),
    [
        ("olmoe", "regular", 1, None, 7_123_851_264),
        ("olmoe", "regular", 2, None, 4_707_932_160),
        ("olmoe", "regular", 4, None, 3_499_972_608),
        ("olmoe", "regular", 4, 128, 4_709_505_024),
        ("olmoe", "regular", 4, 256, 7_128_569_856),
        ("deepseek", "regular", 1, None, 7_123_851_264),
        ("deepseek", "regular", 2, None, 4_707_932_160),
        ("deepseek", "regular", 4, None, 3_499_972_608),
        ("deepseek", "regular", 4, 128, 4_709_505_024),
        ("deepseek", "regular", 4, 256, 7_128_569_856),
        ("olmoe", "tiny", 1, None, 522_671_616),
        ("olmoe", "tiny", 2, None, 371_676_672),
        ("olmoe", "tiny", 4, None, 296_179_200),
        ("deepseek", "tiny", 1, None, 522_671_616),
        ("deepseek", "tiny", 2, None, 371_676_672),
        ("deepseek", "tiny", 4, None, 296_179_200),
        ("qwen3_moe", "regular", 1, None, 6_410_289_152),
        ("qwen3_moe", "regular", 2, None, 3_862_249_472),
        ("qwen3_moe", "regular", 4, None, 2_588_229_632),
        ("qwen3_moe", "tiny", 1, None, 458_906_240),
        ("qwen3_moe", "tiny", 2, None, 299_653_760),
        ("qwen3_moe", "tiny", 4, None, 220_027_520),
    ],
)
def test_totals_of_the_paper(preset, scale, group_size, width, expected):
    tie = TieConfig(group_size=group_size, num_tied_experts=width)
    assert count(tie, preset=preset, scale=scale).total == expected


def test_untied_keeps_the_width_and_active_does_not_depend_on_tying():
    untied = count(preset="olmoe")
    tied = count(TieConfig(group_size=4), preset="olmoe")
    wide = count(TieConfig(group_size=4, num_tied_experts=128), preset="olmoe")
    assert tied.untied == untied.total == untied.untied
    assert tied.active == untied.active == untied.total - 16 * (64 - 8) * 3 * 2048 * 1024
    assert wide.untied - tied.untied == 12 * 64 * (3 * 2048 * 1024 + 2048)
    assert wide.active - tied.active == 12 * 64 * 2048


def test_each_kind_by_hand():
    tie = TieConfig(group_size=2, skip_first=0, skip_last=0, num_tied_experts=6)
    shared = {"moe_shared_expert_intermediate_size": 24, "moe_shared_expert_gate": True}
    assert count(tie, **SMALL, **shared, moe_layer_freq=[0, 1, 1], qk_layernorm=True) == ParameterCount(
        embedding=100 * 32,
        output=100 * 32,
        attention=3 * (32 * (32 + 16 + 16) + 32 * 32),
        norms=3 * (32 + 32 + 8 + 8) + 32,
        router=2 * 6 * 32,
        dense_mlp=3 * 32 * 48,
        shared_experts=2 * (3 * 32 * 24 + 32),
        bank_experts=(6 * 3 * 32 * 16,),
        untied_routed_experts=2 * 6 * 3 * 32 * 16,
        active_routed_experts=2 * 2 * 3 * 32 * 16,
    )


def test_attention_and_routers_are_counted_once_where_they_are_shared():
    tie = TieConfig(group_size=2, skip_first=1, skip_last=0)
    experts = count(tie, **SMALL, qk_layernorm=True)
    attention = count(replace(tie, share="experts_attention"), **SMALL, qk_layernorm=True)
    everything = count(replace(tie, share="all"), **SMALL, qk_layernorm=True)
    of_attention, norms, router = 32 * (32 + 16 + 16) + 32 * 32, 8 + 8, 4 * 32
    assert (attention.attention, attention.norms) == (2 * of_attention, experts.norms - norms)
    assert experts.total - attention.total == of_attention + norms
    assert (everything.router, attention.total - everything.total) == (2 * router, router)
    assert experts.untied == attention.untied == everything.untied
    assert experts.active == attention.active == everything.active


def test_a_narrow_untied_model_can_have_the_parameters_of_a_tied_one():
    fields = {**SMALL, "num_layers": 12, "num_moe_experts": 64}
    tied, narrow = count(TieConfig(group_size=4), **fields), count(TieConfig(num_tied_experts=16), **fields)
    assert narrow.routed_experts == tied.routed_experts
    assert tied.total - narrow.total == 8 * (64 - 16) * 32  # its routers are narrower, too
    assert narrow.total == narrow.untied


def test_biases_layer_norm_and_plain_mlp_by_hand():
    result = count(
        **SMALL,
        add_bias_linear=True,
        normalization="LayerNorm",
        gated_linear_unit=False,
        qk_layernorm=True,
        moe_layer_freq=[1, 0, 0],
        expert_backend="sequential",
    )
    assert result.attention == 3 * ((32 + 1) * 64 + (32 + 1) * 32)
    assert result.norms == 2 * (3 * (32 + 32 + 8 + 8) + 32)
    assert result.router == 4 * (32 + 1)
    assert result.dense_mlp == 2 * ((32 + 1) * 48 + (48 + 1) * 32)
    assert result.bank_experts == (4 * ((32 + 1) * 16 + (16 + 1) * 32),)


@pytest.mark.parametrize(
    ("fields", "difference"),
    [
        ({"add_qkv_bias": True}, 3 * 64),
        ({"kv_channels": 16}, 3 * 32 * (64 + 2 * 32 + 64 - 96)),
        ({"share_embeddings_and_output_weights": True}, -100 * 32),
        ({"qk_layernorm": True, "qk_norm_scope": "projection"}, 3 * (32 + 16)),
        ({"moe_router_topk": 4}, 0),
    ],
)
def test_what_one_option_adds(fields, difference):
    assert count(**{**SMALL, **fields}).total - count(**SMALL).total == difference


def test_parts_sum_to_the_total():
    result = count(TieConfig(group_size=4), preset="quickstart", moe_shared_expert_intermediate_size=64)
    kinds = ("embedding", "output", "attention", "norms", "router", "dense_mlp", "shared_experts")
    assert result.total == sum(getattr(result, kind) for kind in kinds) + sum(result.bank_experts)
    assert len(result.bank_experts) == 5


def test_vocabulary_may_be_given():
    model = ModelConfig.resolve({**SMALL, "vocab_size": None})
    topology = model.topology(TieConfig())
    assert count_parameters(model, topology, 50).embedding == 50 * 32
    with pytest.raises(ConfigError, match=r"model\.vocab_size = None"):
        count_parameters(model, topology)


@pytest.mark.parametrize("name", ["attention_output_gate", "mtp_num_layers", "moe_latent_size"])
def test_refuses_what_it_cannot_count(name):
    with pytest.raises(ConfigError, match=rf"model\.{name} = 1"):
        count(**SMALL, **{name: 1})
    assert count(**SMALL, **{name: 0}) == count(**SMALL)


@pytest.mark.parametrize(
    "difference", [{"moe_layer_freq": [0, 1, 1]}, {"num_layers": 4, "moe_layer_freq": [1, 1, 1, 0]}]
)
def test_refuses_a_topology_of_another_model(difference):
    other = ModelConfig.resolve({**SMALL, **difference})
    with pytest.raises(ConfigError, match="topology = "):
        count_parameters(ModelConfig.resolve(SMALL), other.topology(TieConfig()))


@pytest.mark.parametrize(("preset", "hf_class"), [("olmoe", "Olmoe"), ("qwen3_moe", "Qwen3Moe")])
def test_equals_the_hugging_face_model(preset, hf_class):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = ModelConfig.resolve({"preset": preset, "scale": "tiny", "vocab_size": 1000})
    config = getattr(transformers, f"{hf_class}Config")(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        head_dim=model.kv_channels,
        num_experts=model.num_moe_experts,
        num_experts_per_tok=model.moe_router_topk,
        intermediate_size=model.moe_ffn_hidden_size,
        moe_intermediate_size=model.moe_ffn_hidden_size,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        reference = getattr(transformers, f"{hf_class}ForCausalLM")(config)
    topology = model.topology(TieConfig())
    assert count_parameters(model, topology).total == sum(p.numel() for p in reference.parameters())
