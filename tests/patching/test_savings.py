"""The model and layout that arguments describe, against presets and sums done by hand."""

from __future__ import annotations

import pytest

from megatron_tied.errors import ConfigError
from megatron_tied.models.config import ModelConfig
from megatron_tied.patching.arguments import Arguments, arguments_from_keys
from megatron_tied.patching.megatron_arguments import derive, missing, moe_pattern, unknown_layers
from megatron_tied.patching.savings import Savings, savings
from megatron_tied.planner.parameters import count_parameters
from megatron_tied.topology import TieConfig, TieTopology, moe_layers

TIE = TieConfig(group_size=4)
QWEN = (
    "--num-layers 48 --hidden-size 2048 --ffn-hidden-size 6144 --num-attention-heads 32 --kv-channels 128 "
    "--group-query-attention --num-query-groups 4 --qk-layernorm --num-experts 128 --moe-ffn-hidden-size 768 "
    "--moe-router-topk 8 --swiglu --disable-bias-linear --normalization RMSNorm "
    "--untie-embeddings-and-output-weights --padded-vocab-size 151936 --bf16"
)
DEEPSEEK = (
    "--num-layers 61 --hidden-size 7168 --ffn-hidden-size 18432 --num-attention-heads 128 --multi-latent-attention "
    "--q-lora-rank 1536 --kv-lora-rank 512 --qk-head-dim 128 --qk-pos-emb-head-dim 64 --v-head-dim 128 --qk-layernorm "
    "--num-experts 256 --moe-layer-freq ([0]*3+[1]*58) --moe-ffn-hidden-size 2048 --moe-router-topk 8 --swiglu "
    "--moe-shared-expert-intermediate-size 2048 --disable-bias-linear --normalization RMSNorm "
    "--untie-embeddings-and-output-weights --vocab-size 129280 --bf16 --use-distributed-optimizer"
)
SMALL = "--num-layers 8 --hidden-size 64 --num-attention-heads 4 --num-experts 8 --disable-bias-linear --vocab-size 128"


def read(text: str) -> Arguments:
    arguments, words = Arguments(), text.split()
    starts = [place for place, word in enumerate(words) if word.startswith("--")]
    for start, end in zip(starts, [*starts[1:], len(words)], strict=True):
        arguments.add(words[start], words[start + 1 : end])
    return arguments


def saved(text: str, tie: TieConfig = TIE) -> Savings:
    arguments = read(text)
    return savings(derive(arguments), tie, arguments)


@pytest.mark.parametrize(("text", "preset"), [(QWEN, "qwen3_30b_a3b"), (DEEPSEEK, "deepseek_v3")])
def test_a_model_has_as_many_parameters_as_its_preset(text: str, preset: str) -> None:
    model = ModelConfig.resolve({"preset": preset})
    untied, tied = (
        count_parameters(model, TieTopology.build(tie, model.num_layers, model.moe_layers()), vocab_size)
        for tie, vocab_size in ((TieConfig(), None or model.vocab_size), (TIE, model.vocab_size))
    )
    found = saved(text)
    assert (found.untied.total, found.tied.total) == (untied.total, tied.total)
    assert (found.untied.experts, found.tied.experts) == (untied.routed_experts, tied.routed_experts)


@pytest.mark.parametrize(
    ("more", "expert_bytes", "other_bytes"),
    [
        # Weights and fp32 gradients on every rank, and 12 bytes more of the optimizer: whole, or divided.
        ("--bf16", 2 + 4 + 12, 2 + 4 + 12),
        ("--bf16 --nproc-per-node 4", 2 + 4 + 12, 2 + 4 + 12),
        ("--bf16 --use-distributed-optimizer --nproc-per-node 4", 6 + 12 / 4, 6 + 12 / 4),
        ("--bf16 --use-distributed-optimizer --nproc-per-node 4 --expert-model-parallel-size 2", 3 + 6 / 2, 6 + 12 / 4),
        ("", 4 + 4 + 8, 4 + 4 + 8),
    ],
)
def test_bytes_of_a_rank(more: str, expert_bytes: float, other_bytes: float) -> None:
    found = saved(f"{SMALL} {more}").tied
    others = found.total - found.experts
    assert found.rank_bytes == pytest.approx(found.experts * expert_bytes + others * other_bytes, rel=1e-6)


def test_tensor_parallelism_cuts_experts_unless_it_is_told_otherwise() -> None:
    whole, cut = (
        saved(f"{SMALL} --tensor-model-parallel-size 2 {more}").tied.rank_bytes
        for more in ("--expert-tensor-parallel-size 1", "")
    )
    experts = saved(SMALL).tied.experts
    assert whole - cut == experts // 2 * 16


def test_pipeline_stages_divide_layers_and_the_fullest_counts() -> None:
    found = saved(f"{SMALL} --pipeline-model-parallel-size 2 --nproc-per-node 2", TieConfig(2, 1, 1))
    # Banks 0 [1 2] [3 4] | [5 6] 7: the cut that parts no group is 5 and 3 layers, with three and two banks.
    largest = found.tied.experts // 5 * 3 * 16
    assert largest < found.tied.rank_bytes < largest * 1.2


def test_gradients_that_are_sent() -> None:
    found = saved(f"{SMALL} --bf16 --use-distributed-optimizer --nproc-per-node 4")
    assert found.tied.traffic == found.tied.experts * 4 * 3 // 4
    assert saved(f"{SMALL} --bf16 --nproc-per-node 4").tied.traffic == 2 * found.tied.traffic
    halved = saved(f"{SMALL} --bf16 --use-distributed-optimizer --nproc-per-node 4 --grad-reduce-in-bf16")
    assert 2 * halved.tied.traffic == found.tied.traffic


def test_what_is_told() -> None:
    lines = "\n".join(saved(f"{QWEN} --nproc-per-node 8 --nnodes 2 --expert-model-parallel-size 8").lines())
    for part in ("48 layers, 128 experts, top 8", "0 1 [2 3 4 5]", "16 ranks, expert parallel 8", "30,532,122,624"):
        assert part in lines
    assert "assumed" not in lines


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            "--nproc-per-node 8 --expert-model-parallel-size 3",
            "3 ranks, the fewest for these parallel sizes; 8 are named",
        ),
        ("--expert-model-parallel-size 4", "assumed: 4 ranks, the fewest for these parallel sizes"),
        ("--mtp-num-layers 1", "left out: --mtp-num-layers, whose parameters are not counted"),
    ],
)
def test_what_is_assumed_and_left_out_is_told(more: str, message: str) -> None:
    assert message in "\n".join(saved(f"{SMALL} {more}").lines())


def test_a_size_of_the_environment_is_assumed() -> None:
    arguments = read(SMALL)
    arguments.add("--expert-model-parallel-size", [None])
    assert "assumed: --expert-model-parallel-size 1" in "\n".join(savings(derive(arguments), TIE, arguments).lines())


def test_without_a_vocabulary_embeddings_are_left_out() -> None:
    without = saved(SMALL.replace("--vocab-size 128", ""))
    assert saved(SMALL).tied.total - without.tied.total == 128 * 64
    assert "left out: embeddings" in "\n".join(without.lines())


def test_a_flag_that_differs_between_branches_is_not_known() -> None:
    arguments = read(SMALL)
    arguments.add("--num-layers", ["8"], source=1)
    assert missing(arguments) == []
    arguments.add("--num-layers", ["9"], source=2)
    assert missing(arguments) == ["--num-layers"]


@pytest.mark.parametrize("name", ["--moe-layer-freq", "--first-k-dense-replace"])
def test_layers_that_depend_on_the_environment_are_not_guessed(name: str) -> None:
    arguments = read(SMALL)
    arguments.add(name, [None])
    assert missing(arguments) == unknown_layers(arguments) == [name]


@pytest.mark.parametrize(
    ("more", "layers"),
    [
        ("", [0, 1, 2, 3]),
        ("--moe-layer-freq 2", [0, 2]),
        ("--moe-layer-freq ([0]*1+[1]*3)", [1, 2, 3]),
        ("--first-k-dense-replace 1 --moe-layer-freq 1", [1, 2, 3]),
        ("--first-k-dense-replace 0 --moe-layer-freq 2", [0, 2]),
        ("--first-k-dense-replace -1 --moe-layer-freq -1", [0, 1, 2, 3]),
    ],
)
def test_moe_layers(more: str, layers: list[int]) -> None:
    assert list(moe_layers(moe_pattern(read(f"--num-layers 4 {more}"), 4), 4)) == layers


@pytest.mark.parametrize("pattern", ["([0]*1+[1]*5)", "[1]*x", "some"])
def test_a_pattern_that_is_none_or_of_other_layers(pattern: str) -> None:
    with pytest.raises(ConfigError, match="--moe-layer-freq"):
        moe_pattern(read(f"--num-layers 4 --moe-layer-freq {pattern}"), 4)


@pytest.mark.parametrize(
    ("more", "weights"), [("", 2 * 256 * 64), ("--swiglu", 3 * 128 * 64), ("--geglu", 3 * 256 * 64)]
)
def test_the_width_of_an_expert_is_megatron_s_own_where_it_is_not_said(more: str, weights: int) -> None:
    assert saved(f"{SMALL} {more}").untied.experts == 8 * 8 * weights


def test_keys_describe_the_model_that_flags_do() -> None:
    model = {
        "num_layers": 48,
        "hidden_size": 2048,
        "ffn_hidden_size": 6144,
        "num_attention_heads": 32,
        "kv_channels": 128,
        "num_query_groups": 4,
        "qk_layernorm": True,
        "num_moe_experts": 128,
        "moe_ffn_hidden_size": 768,
        "moe_router_topk": 8,
        "moe_layer_freq": [1] * 48,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "share_embeddings_and_output_weights": False,
        "vocab_size": 151936,
        "window_size": None,
    }
    arguments = arguments_from_keys({"bf16": True, "model": model}, {"expert_model_parallel_size": 8}, model)
    found = savings(derive(arguments), TIE, arguments)
    assert found.untied.total == saved(QWEN).untied.total
    assert found.derived.layout.precision == "bf16"
    assert found.derived.layout.expert_parallel == 8
    said_otherwise = {"add_bias_linear": True, "share_embeddings_and_output_weights": True, "qk_layernorm": False}
    flags = arguments_from_keys(said_otherwise)
    for name in ("--disable-bias-linear", "--untie-embeddings-and-output-weights", "--qk-layernorm"):
        assert name not in flags


@pytest.mark.parametrize(
    ("flags", "width"),
    [
        ("--bf16", 4),
        ("--bf16 --grad-reduce-in-bf16", 2),
        ("--fp16", 2),
        ("--fp16 --accumulate-allreduce-grads-in-fp32", 4),
        ("--grad-reduce-in-bf16", 4),
    ],
)
def test_gradients_are_as_wide_as_their_buffers(flags: str, width: int) -> None:
    found = saved(f"{SMALL} {flags}", TieConfig(group_size=2)).tied
    weights, optimizer = (4, 8) if "16 " not in f"{flags} ".replace("-in-bf16", "") else (2, 12)
    assert found.rank_bytes == found.total * (weights + width + optimizer)
