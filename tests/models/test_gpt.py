"""The built model: equal to the Hugging Face class, counted by the closed formula, made from its seed alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.experts import HAVE_TE
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_tied import ConfigError, ModelConfig, TieConfig, build_gpt_model, tied_decoder_block_spec
from megatron_tied.layers.attention import ProjectionRMSNorm, _Clip
from megatron_tied.models.gpt import transformer_config
from megatron_tied.planner.parameters import count_parameters
from tests.distributed.training_run import Case, load_reference
from tests.distributed.training_run import model_config as config_of_reference
from tests.oracle.reference import build_reference, random_batches, tiny, weights
from tests.tiny_model import FIELDS, TIE, build, gradients, inputs, loss, model_config

pytestmark = pytest.mark.usefixtures("one_process")


# ---- equal to the Hugging Face class ----------------------------------------------------------------------


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("arch", ["olmoe", "qwen3_moe"])
def test_logits_equal_the_hugging_face_class(arch, dispatcher):
    spec = tiny(arch)
    reference = build_reference(spec, seed=1)
    tokens = random_batches(spec, 1, 2, 16, seed=3)[0][:, :-1]
    settings = config_of_reference(spec, Case(dispatcher=dispatcher))
    model = build_gpt_model(settings, TieConfig(banks=list(spec.banks)))
    load_reference(model, spec, weights(reference))
    positions = torch.arange(16).expand_as(tokens)
    mask = torch.ones(16, 16).triu(1).bool()[None, None]
    with torch.no_grad():
        found, expected = model(tokens, positions, mask), reference(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_norm_spans_the_whole_projection():
    projection = build(qk_norm_scope="projection").decoder.layers[0].self_attention
    assert (projection.q_layernorm.weight.shape, projection.k_layernorm.weight.shape) == ((32,), (16,))
    head = build(qk_norm_scope="head").decoder.layers[0].self_attention
    assert head.q_layernorm.weight.shape == head.k_layernorm.weight.shape == (8,)

    norm = ProjectionRMSNorm(transformer_config(model_config()), 8, eps=0.1, heads=4)
    torch.nn.init.uniform_(norm.weight)
    x = torch.randn(5, 2, 4, 8)
    flat = x.reshape(5, 2, 32)
    expected = flat / (flat.square().mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected.view_as(x))


def test_query_key_and_value_are_clipped_at_both_ends():
    attention = build(qkv_clip=0.25, qk_layernorm=False).decoder.layers[0].self_attention
    free = build(qk_layernorm=False).decoder.layers[0].self_attention
    hidden = 2 * torch.randn(8, 2, 32)
    for clipped, plain in zip(
        attention.get_query_key_value_tensors(hidden), free.get_query_key_value_tensors(hidden), strict=True
    ):
        assert plain.abs().max() > 0.25
        assert torch.equal(clipped, plain.clamp(-0.25, 0.25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass_a_clip_as_they_pass_a_clamp(dtype: torch.dtype) -> None:
    x = torch.tensor([-9, -8, -7.96875, 0, 7.96875, 8, 8.0625], dtype=dtype, requires_grad=True)
    upstream = torch.arange(1, 8, dtype=dtype)
    (found,) = torch.autograd.grad(_Clip.apply(x, 8.0), x, upstream)
    (expected,) = torch.autograd.grad(x.clamp(-8, 8), x, upstream)
    assert torch.equal(found, expected)
    assert expected.tolist() == [0, 2, 3, 4, 5, 6, 0]


def test_attention_that_only_upstream_has_masks_without_a_mask(one_process: None) -> None:
    """`LossFunction` leaves the mask to core attention, and upstream makes its own on a CUDA device."""
    model = build(softmax_type="learnable")
    tokens, positions = torch.randint(64, (2, 8)), torch.arange(8).expand(2, 8)
    mask = torch.ones(8, 8).triu(1).bool()[None, None]
    assert torch.equal(model(tokens, positions, None), model(tokens, positions, mask))


def test_no_weight_is_what_memory_held(one_process: None) -> None:
    torch.use_deterministic_algorithms(True)  # memory that nobody has filled is NaN
    try:
        model = build(softmax_type="learnable")
    finally:
        torch.use_deterministic_algorithms(False)
    assert [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()] == []


# ---- parameters -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "scale", "tie", "total", "backend"),
    [
        ("olmoe", "regular", TieConfig(), 7_123_851_264, "grouped"),
        ("olmoe", "regular", TieConfig(group_size=4), 3_499_972_608, "grouped"),
        ("olmoe", "regular", TieConfig(group_size=4, num_tied_experts=256), 7_128_569_856, "grouped"),
        ("deepseek", "tiny", TieConfig(group_size=2), 371_676_672, "sequential"),
        ("qwen3_moe", "regular", TieConfig(group_size=4), 2_588_229_632, "grouped"),
        ("qwen3_moe", "tiny", TieConfig(group_size=2), 299_653_760, "grouped"),
        ("quickstart", None, TieConfig(group_size=4), None, "sequential"),
    ],
)
def test_a_full_preset_has_as_many_parameters_as_the_formula(preset, scale, tie, total, backend):
    settings = ModelConfig.resolve({"preset": preset, "scale": scale, "expert_backend": backend})
    with torch.device("meta"):
        model = build_gpt_model(settings, tie)
    counted = count_parameters(settings, settings.topology(tie)).total
    assert sum(weight.numel() for weight in model.parameters()) == counted
    assert total in (counted, None)


@pytest.mark.parametrize(
    "fields",
    [
        {"moe_layer_freq": [0, 1, 1, 1, 1, 1], "ffn_hidden_size": 48},
        {"moe_shared_expert_intermediate_size": 24, "moe_shared_expert_gate": True},
        {"add_bias_linear": True, "expert_backend": "sequential", "normalization": "LayerNorm"},
        {"add_qkv_bias": True, "gated_linear_unit": False, "share_embeddings_and_output_weights": True},
        {"qk_norm_scope": "projection", "kv_channels": 16},
        {"qk_layernorm": False},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_options_are_counted_too(fields):
    tie = TieConfig(group_size=2, skip_first=1, skip_last=0)
    settings = model_config(**fields)
    model = build_gpt_model(settings, tie)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(settings, settings.topology(tie)).total


# ---- initialisation ---------------------------------------------------------------------------------------


def named(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def test_the_seed_alone_makes_the_model():
    torch.manual_seed(1)
    first = named(build(seed=7))
    torch.manual_seed(2)
    assert all(torch.equal(weight, first[name]) for name, weight in named(build(seed=7)).items())
    other = named(build(seed=8))
    assert all(torch.equal(weight, first[name]) == (weight.dim() == 1) for name, weight in other.items())


def test_building_leaves_the_random_state_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    build()
    assert torch.equal(torch.get_rng_state(), state)


def test_neither_tying_nor_backend_changes_the_other_weights():
    tied = named(build())
    for other in (named(build(TieConfig())), named(build(expert_backend="sequential"))):
        dense = [name for name in tied if ".mlp.experts." not in name]
        assert len(dense) > 40
        assert all(torch.equal(tied[name], other[name]) for name in dense)


def test_backends_start_from_the_same_experts():
    grouped, sequential = named(build()), named(build(expert_backend="sequential"))
    for owner in (0, 1, 4):
        prefix = f"decoder.layers.{owner}.mlp.experts."
        for which in ("fc1", "fc2"):
            parts = [sequential[f"{prefix}local_experts.{index}.linear_{which}.weight"] for index in range(8)]
            assert torch.equal(torch.stack(parts), grouped[f"{prefix}{which}_weight"])


def test_matrices_are_all_different_and_of_the_configs_spread():
    model = build(
        num_layers=2, hidden_size=128, vocab_size=512, moe_shared_expert_intermediate_size=64, tie=TieConfig()
    )
    matrices = {name: weight for name, weight in named(model).items() if weight.dim() > 1}
    for name, weight in matrices.items():
        projects_out = name.endswith(("linear_proj.weight", "linear_fc2.weight", "fc2_weight"))
        expected = 0.1 / math.sqrt(4) if projects_out else 0.1
        assert weight.std().item() == pytest.approx(expected, rel=0.1), name
    assert len({weight.flatten()[0].item() for weight in matrices.values()}) == len(matrices)


def test_norm_gains_start_at_one_and_biases_at_zero():
    # Memory that torch has just freed is seldom zero: a bias that nobody fills shows.
    junk = [torch.full((size,), math.nan) for size in range(1, 200) for _ in range(20)]
    del junk
    biased = {"add_bias_linear": True, "add_qkv_bias": True, "expert_backend": "sequential"}
    for name, weight in named(build(**biased)).items():
        if weight.dim() == 1:
            assert weight.unique().tolist() == [0.0 if name.endswith("bias") else 1.0], name


# ---- precision, errors, recompute -------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_rounds_the_same_matrices(precision, dtype):
    full = named(build())
    half = build(precision=precision)
    for name, weight in named(half).items():
        if weight.dim() > 1:
            assert weight.dtype == dtype
            assert torch.equal(weight, full[name].to(dtype))
    assert (half.config.bf16, half.config.fp16) == (precision == "bf16", precision == "fp16")
    assert half.config.params_dtype == dtype


def test_bf16_trains_near_fp32():
    losses = []
    for precision in ("fp32", "bf16"):
        model = build(precision=precision)
        losses.append(loss(model, inputs()))
        losses[-1].backward()
        assert all(weight.grad.isfinite().all() for weight in model.parameters())
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.02)


def test_a_vocabulary_is_asked_for():
    with pytest.raises(ConfigError, match=r"^model\.vocab_size = None: must be given: the tokenizer's"):
        build(vocab_size=None)


def test_a_topology_of_another_depth_is_refused():
    config = transformer_config(model_config())
    with pytest.raises(ConfigError, match=r"^model\.num_layers = 6: the topology is made for 4 layers"):
        tied_decoder_block_spec(config, model_config(num_layers=4).topology(TieConfig()))


def test_a_tie_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"^tie\.group_size = 3: must be at most 2"):
        build(TieConfig(group_size=3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a host without CUDA")
def test_overlap_of_shared_experts_is_refused_without_streams():
    fields = {"moe_shared_expert_intermediate_size": 16, "moe_shared_expert_overlap": True}
    with pytest.raises(ConfigError, match=r"^model\.moe_shared_expert_overlap = True: must be false .* needs CUDA"):
        build(**fields)
    build(**fields | {"moe_shared_expert_overlap": False})


@pytest.mark.skipif(HAVE_TE, reason="needs a host without Transformer Engine")
@pytest.mark.parametrize("option", ["moe_permute_fusion", "moe_router_fusion"])
def test_transformer_engines_kernels_are_refused_without_it(option: str):
    with pytest.raises(ConfigError, match=rf"^model\.{option} = True: must be false .* needs Transformer"):
        build(**{option: True})


@pytest.mark.parametrize("backend", ["grouped", "sequential"])
@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 3},
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
        {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "layernorm"]},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_recompute_changes_no_gradient(backend, recompute):
    found = []
    for fields in ({}, recompute):
        model = build(expert_backend=backend, **fields)
        loss(model, inputs()).backward()
        found.append(gradients(model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


def test_a_native_megatron_config_takes_the_tied_spec():
    # Without our builder: the layers then initialise their own banks.
    config = TransformerConfig(
        num_layers=6,
        hidden_size=32,
        num_attention_heads=4,
        num_moe_experts=8,
        moe_ffn_hidden_size=16,
        use_cpu_initialization=True,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
    )
    spec = tied_decoder_block_spec(config, model_config().topology(TIE), use_transformer_engine=False)
    torch.manual_seed(3)
    layers = [build_module(layer.submodules.mlp, config=config) for layer in spec.layer_specs]
    assert layers[2].experts.fc1_weight is layers[1].experts.fc1_weight
    values = [layer.experts.fc1_weight for layer in (layers[0], layers[1], layers[4])]
    assert all(value.std().item() == pytest.approx(0.02, rel=0.1) for value in values)
    assert len({value.flatten()[0].item() for value in values}) == 3


@pytest.mark.parametrize(
    ("fields", "is_fused"),
    [
        ({}, True),
        ({"activation": "gelu"}, False),
        ({"gated_linear_unit": False}, False),
        ({"add_bias_linear": True, "expert_backend": "sequential"}, False),
        ({"activation_func_clamp_value": 7.0, "expert_backend": "sequential"}, False),
        ({"glu_linear_offset": 1.0, "expert_backend": "sequential"}, False),
    ],
)
def test_activations_are_fused_where_that_is_the_same_function(fields: dict[str, Any], is_fused: bool) -> None:
    assert ModelConfig.resolve(FIELDS | fields).has_fused_activation() == is_fused
