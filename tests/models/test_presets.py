"""The model section: presets, overriding, derived sizes, and errors that name the field."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from megatron_tied.errors import ConfigError
from megatron_tied.models.config import ModelConfig
from megatron_tied.models.presets import PRESETS, preset_fields
from megatron_tied.topology import TieConfig

SIZES = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_moe_experts": 8}


def problems_of(**fields: object) -> dict[str, str]:
    with pytest.raises(ConfigError) as error:
        ModelConfig.resolve(fields)
    return {problem.field: problem.valid for problem in error.value.problems}


# ---- presets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "scale", "hidden", "layers", "heads", "groups", "experts", "topk", "expert_ffn"),
    [
        ("olmoe", "regular", 2048, 16, 16, 16, 64, 8, 1024),
        ("olmoe", "small", 1024, 16, 8, 8, 64, 8, 512),
        ("olmoe", "tiny", 512, 16, 4, 4, 64, 8, 256),
        ("deepseek", "regular", 2048, 16, 16, 16, 64, 6, 1024),
        ("deepseek", "small", 1024, 16, 8, 8, 64, 6, 512),
        ("deepseek", "tiny", 512, 16, 4, 4, 64, 6, 256),
        ("qwen3_moe", "regular", 1536, 28, 24, 4, 60, 4, 768),
        ("qwen3_moe", "small", 768, 28, 12, 2, 60, 4, 384),
        ("qwen3_moe", "tiny", 384, 28, 6, 1, 60, 4, 192),
        ("quickstart", None, 256, 8, 4, 4, 16, 4, 128),
    ],
)
def test_sizes(preset, scale, hidden, layers, heads, groups, experts, topk, expert_ffn):
    model = ModelConfig.resolve({"preset": preset, "scale": scale})
    assert (model.hidden_size, model.num_layers) == (hidden, layers)
    assert (model.num_attention_heads, model.num_query_groups) == (heads, groups)
    assert model.kv_channels == hidden // heads
    assert (model.num_moe_experts, model.moe_router_topk) == (experts, topk)
    assert model.moe_ffn_hidden_size == expert_ffn
    assert model.moe_layers() == tuple(range(layers))
    assert (model.preset, model.scale) == (preset, scale)


@pytest.mark.parametrize("preset", ["olmoe", "deepseek", "qwen3_moe"])
def test_paper_presets_share_the_recipe(preset):
    model = ModelConfig.resolve({"preset": preset})
    assert (model.scale, model.vocab_size) == ("regular", 100_277)
    assert (model.moe_aux_loss_coeff, model.moe_z_loss_coeff) == (1e-2, 1e-4)
    assert (model.normalization, model.activation, model.gated_linear_unit) == ("RMSNorm", "silu", True)
    assert not model.add_bias_linear
    assert not model.share_embeddings_and_output_weights
    assert model.moe_shared_expert_intermediate_size is None


def test_routing_and_norms_tell_the_architectures_apart():
    olmoe = ModelConfig.resolve({"preset": "olmoe"})
    qwen3 = ModelConfig.resolve({"preset": "qwen3_moe"})
    assert olmoe.qk_layernorm
    assert qwen3.qk_layernorm
    assert (olmoe.qk_norm_scope, qwen3.qk_norm_scope) == ("projection", "head")
    assert (olmoe.qkv_clip, qwen3.qkv_clip) == (8.0, None)
    assert (olmoe.moe_router_pre_softmax, qwen3.moe_router_pre_softmax) == (True, False)
    assert (olmoe.layernorm_epsilon, qwen3.layernorm_epsilon) == (1e-5, 1e-6)
    assert (olmoe.rotary_base, qwen3.rotary_base) == (10_000, 1_000_000)


def test_deepseek_is_the_olmoe_body_with_top_6():
    olmoe, deepseek = preset_fields("olmoe", "small"), preset_fields("deepseek", "small")
    assert {key for key in olmoe if olmoe[key] != deepseek[key]} == {"preset", "moe_router_topk"}


def test_explicit_keys_override_the_preset():
    model = ModelConfig.resolve(
        {"preset": "olmoe", "scale": "tiny", "num_layers": 6, "qkv_clip": None, "hidden_size": 256}
    )
    assert (model.num_layers, model.qkv_clip) == (6, None)
    assert model.kv_channels == 64  # derived from the overridden width
    assert model.num_moe_experts == 64


def test_resolving_the_resolved_changes_nothing():
    for name in PRESETS:
        model = ModelConfig.resolve({"preset": name, "moe_router_dtype": "fp32"})
        assert ModelConfig.resolve(json.loads(json.dumps(model.model_dump()))) == model


@pytest.mark.parametrize(
    ("fields", "field", "valid"),
    [
        ({"preset": "olmo"}, "model.preset", 'did you mean "olmoe"?'),
        ({"preset": ["olmoe"]}, "model.preset", "olmoe, deepseek, qwen3_moe, quickstart"),
        ({"preset": "olmoe", "scale": "big"}, "model.scale", "regular, small, tiny"),
        ({"preset": "quickstart", "scale": "tiny"}, "model.scale", "one size"),
        ({"scale": "tiny"}, "model.scale", "with a model.preset"),
    ],
)
def test_unknown_preset_or_scale(fields, field, valid):
    problems = problems_of(**fields)
    assert list(problems) == [field]
    assert valid in problems[field]


# ---- fields -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("freq", "layers"), [(1, (0, 1, 2, 3)), (2, (0, 2)), (3, (0, 3)), ([0, 1, 1, 0], (1, 2)), ([0] * 4, ())]
)
def test_moe_layers(freq, layers):
    assert ModelConfig.resolve({**SIZES, "moe_layer_freq": freq}).moe_layers() == layers


def test_derived_sizes():
    model = ModelConfig.resolve(SIZES)
    assert (model.ffn_hidden_size, model.moe_ffn_hidden_size) == (256, 256)
    assert (model.num_query_groups, model.kv_channels) == (4, 16)
    assert ModelConfig.resolve({**SIZES, "ffn_hidden_size": 96}).moe_ffn_hidden_size == 96
    assert ModelConfig.resolve({**SIZES, "num_attention_heads": 5, "kv_channels": 8}).kv_channels == 8


@pytest.mark.filterwarnings("ignore:moe_ffn_hidden_size is not set", "ignore:full scope is deprecated")
def test_agrees_with_megatron_core():
    megatron = pytest.importorskip("megatron.core.transformer.transformer_config").TransformerConfig
    ours = ModelConfig.resolve({**SIZES, "moe_router_dtype": "fp32"})
    kwargs = ours.transformer_kwargs()
    assert kwargs["moe_router_dtype"] == "fp32"
    config = megatron(**kwargs)
    assert {name: getattr(config, name) for name in kwargs} == kwargs

    left_out = megatron(num_layers=4, hidden_size=64, num_attention_heads=4, num_moe_experts=8)
    for name in ("ffn_hidden_size", "moe_ffn_hidden_size", "num_query_groups", "kv_channels"):
        assert getattr(left_out, name) == getattr(ours, name)

    names = {field.name for field in dataclasses.fields(megatron)}
    assert ours.unknown_fields(names) == []
    named = set(ModelConfig.model_fields)
    # Its `init_method` is a function, which ours names.
    assert named & names == kwargs.keys() - {"moe_router_dtype", "moe_grouped_gemm"} | {"init_method"}


@pytest.mark.parametrize("backend", ["te", "grouped", "sequential"])
def test_only_transformer_engine_uses_its_grouped_gemm(backend):
    kwargs = ModelConfig.resolve({**SIZES, "expert_backend": backend}).transformer_kwargs()
    assert kwargs["moe_grouped_gemm"] is (backend != "sequential")


def test_unknown_fields_suggest_the_nearest_name():
    model = ModelConfig.resolve({**SIZES, "moe_router_top_k": 2, "qkv_clipp": 8.0, "zzz": 1})
    problems = model.unknown_fields(["moe_permute_fusion"])
    assert [(problem.field, problem.value) for problem in problems] == [
        ("model.moe_router_top_k", 2),
        ("model.qkv_clipp", 8.0),
        ("model.zzz", 1),
    ]
    assert "did you mean model.moe_router_topk?" in problems[0].valid
    assert "did you mean model.qkv_clip?" in problems[1].valid
    assert problems[2].valid == "is not a model option"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"num_layers": "4"}, "num_layers"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_layers": 4.0}, "num_layers"),
        ({"layernorm_epsilon": "1e-5"}, "layernorm_epsilon"),
        ({"qk_layernorm": 1}, "qk_layernorm"),
        ({"moe_token_dispatcher_type": "flex"}, "moe_token_dispatcher_type"),
        ({"expert_backend": "cutlass"}, "expert_backend"),
        ({"moe_layer_freq": "1"}, "moe_layer_freq"),
        ({"moe_layer_freq": [0, 2, 1, 1]}, "moe_layer_freq"),
        ({"moe_layer_freq": [0, 1, 1]}, "moe_layer_freq"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"num_attention_heads": 5, "kv_channels": None}, "num_attention_heads"),
        ({"num_query_groups": 3}, "num_query_groups"),
        ({"kv_channels": 15}, "kv_channels"),
        ({"rotary_percent": 1.5}, "rotary_percent"),
        ({"qk_norm_scope": "projection"}, "qk_norm_scope"),
        (
            {"qk_norm_scope": "projection", "qk_layernorm": True, "normalization": "LayerNorm"},
            "qk_norm_scope",
        ),
        ({"moe_router_topk": 9}, "moe_router_topk"),
        ({"moe_router_topk": 1}, "moe_router_pre_softmax"),
        ({"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias"),
        ({"moe_aux_loss_coeff": [0.1]}, "moe_aux_loss_coeff"),
        ({"moe_router_load_balancing_type": ["aux_loss"]}, "moe_aux_loss_coeff"),
        (
            {"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"], "moe_aux_loss_coeff": [0.1]},
            "moe_aux_loss_coeff",
        ),
        ({"moe_shared_expert_gate": True}, "moe_shared_expert_gate"),
        ({"add_bias_linear": True}, "add_bias_linear"),
        (
            {
                "add_bias_linear": True,
                "expert_backend": "sequential",
                "moe_shared_expert_intermediate_size": 8,
            },
            "add_bias_linear",
        ),
        ({"hidden_size": 60, "num_attention_heads": 2, "moe_ffn_hidden_size": 64}, "hidden_size"),
        ({"moe_ffn_hidden_size": 20}, "moe_ffn_hidden_size"),
        ({"bf16": True}, "bf16"),
        ({"activation_func": "silu"}, "activation_func"),
        ({"expert_model_parallel_size": 2}, "expert_model_parallel_size"),
    ],
)
def test_problems_name_the_field(fields, field):
    with pytest.raises(ConfigError) as error:
        ModelConfig.resolve({**SIZES, **fields})
    assert [problem.field for problem in error.value.problems] == [f"model.{field}"]
    if field in fields:
        assert error.value.problems[0].value == fields[field]


def test_what_the_same_fields_allow():
    allowed = (
        {"moe_router_topk": 8},
        {"moe_router_topk": 1, "moe_router_pre_softmax": True},
        {"moe_router_topk": 1, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
        {"moe_router_load_balancing_type": ["aux_loss"], "moe_aux_loss_coeff": [0.1]},
        {"add_bias_linear": True, "expert_backend": "sequential"},
        {"moe_ffn_hidden_size": 20, "expert_backend": "sequential"},
        {"moe_shared_expert_gate": True, "moe_shared_expert_intermediate_size": 8},
        {"rotary_base": 500_000, "init_method_std": 1, "moe_z_loss_coeff": 0},
    )
    for fields in allowed:
        model = ModelConfig.resolve({**SIZES, **fields})
        assert {name: getattr(model, name) for name in fields} == fields


def test_all_problems_come_at_once():
    required = {f"model.{name}": "must be given, here or by a model.preset" for name in SIZES}
    assert problems_of() == required
    assert list(problems_of(**{**SIZES, "moe_router_topk": 9, "num_query_groups": 3, "bf16": True})) == [
        "model.num_query_groups",
        "model.moe_router_topk",
        "model.bf16",
    ]


@pytest.mark.parametrize("name", ["ffn_hidden_size", "num_query_groups", "kv_channels", "moe_ffn_hidden_size"])
def test_a_size_is_derived_though_another_is_wrong(name: str):
    """pydantic before 2.14 asks for it then, and what is wrong is not among the values that it gives."""
    assert ModelConfig.model_fields[name].get_default(call_default_factory=True, validated_data={}) > 0


def test_topology_of_a_model():
    model = ModelConfig.resolve({"preset": "quickstart", "moe_layer_freq": [0, 1, 1, 1, 1, 1, 1, 0]})
    tie = TieConfig(group_size=2, num_tied_experts=4)
    assert model.topology(tie).describe() == "8 layers: 1 2 [3 4] 5 6; experts of tied banks: 4; dense: 0 7"
    with pytest.raises(ConfigError, match=r"tie\.num_tied_experts = 3.* model\.moe_router_topk = 4"):
        model.topology(dataclasses.replace(tie, num_tied_experts=3))


def test_torch_is_not_imported():
    modules = "megatron_tied.topology, megatron_tied.models.config, megatron_tied.planner.parameters"
    check = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
