"""From Megatron-LM's arguments to the model and layout that the planner counts, and what they leave unsaid."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.megatron_lm.arguments import flag
from megatron_tied.models.config import ModelConfig
from megatron_tied.models.latent_attention import LatentSizes
from megatron_tied.patching.arguments import Arguments
from megatron_tied.patching.expressions import integers
from megatron_tied.planner.layout import Layout

_NEEDED = ("--num-layers", "--hidden-size", "--num-attention-heads", "--num-experts")
_FREQUENCY, _DENSE_FIRST = "--moe-layer-freq", "--first-k-dense-replace"
_GATED = ("--swiglu", "--quick-geglu", "--geglu", "--use-fused-swiglu")
# What adds or replaces parameters in ways that the planner's formulas do not know.
_NOT_COUNTED = (
    "--mtp-num-layers",
    "--moe-latent-size",
    "--attention-output-gate",
    "--experimental-attention-variant",
    "--linear-attention-type",
    "--lora-r",
)


@dataclass(frozen=True)
class DerivedModel:
    """A model with the ranks that it is laid out over.

    vocab_size: padded; None if the tokenizer decides. expert_tensor_parallel: how many ranks cut an expert.
    assumed: what is taken for granted because the arguments do not say it; left_out: what is not counted.
    """

    model: ModelConfig
    layout: Layout
    vocab_size: int | None
    expert_tensor_parallel: int
    context_parallel: int
    assumed: Sequence[str]
    left_out: Sequence[str]


def missing(arguments: Arguments) -> list[str]:
    """The flags without which there is no model to count."""
    return [name for name in _NEEDED if arguments.number(name) is None] + unknown_layers(arguments)


def unknown_layers(arguments: Arguments) -> list[str]:
    """The flags that say which layers are MoE layers, and depend on what the file does not say."""
    return [name for name in (_FREQUENCY, _DENSE_FIRST) if name in arguments and not arguments.values(name)]


def why_missing(arguments: Arguments, name: str) -> str:
    """In words: the flag is not there, or its value depends on what the file does not say."""
    if name not in arguments:
        return f"{name} is not in this file"
    return f"{name} depends on what this file does not say"


def moe_pattern(arguments: Arguments, num_layers: int) -> int | list[int]:
    """What `--moe-layer-freq` says, or the first layers that MindSpeed-LLM keeps dense. Raises ConfigError."""
    dense = arguments.number(_DENSE_FIRST)
    if dense is not None and dense > 0:
        return [int(layer >= dense) for layer in range(num_layers)]
    words = arguments.values(_FREQUENCY)
    number = arguments.number(_FREQUENCY)
    if number is not None or not words:
        return max(1, number or 1)
    text = " ".join(words)
    pattern = integers(text)
    if pattern is None:
        raise ConfigError(Problem(_FREQUENCY, text, "must be an integer or a list such as ([0]*3+[1]*58)"))
    if len(pattern) != num_layers:
        valid = f"must have one entry per layer: --num-layers = {num_layers}, not {len(pattern)}"
        raise ConfigError(Problem(_FREQUENCY, text, valid))
    return pattern


def derive(arguments: Arguments) -> DerivedModel:
    """The model and layout of arguments that `missing` finds complete. Raises ConfigError for sizes that clash."""
    assumed: list[str] = []
    model = ModelConfig.resolve(_model_fields(arguments))
    sizes = _Sizes(arguments)
    layout = Layout(
        world_size=_world_size(arguments, sizes, assumed),
        seq_length=arguments.number("--seq-length") or 4096,
        expert_parallel=sizes.expert,
        tensor_parallel=sizes.tensor,
        pipeline_parallel=sizes.pipeline,
        precision="bf16" if "--bf16" in arguments else "fp16" if "--fp16" in arguments else "fp32",
        zero_stage=1 if _shards_optimizer(arguments) else 0,
    )
    if sizes.unknown:
        assumed.append(", ".join(f"{name} {size}" for name, size in sizes.unknown.items()))
    return DerivedModel(
        model,
        layout,
        _vocab_size(arguments, sizes.tensor),
        sizes.expert_tensor,
        sizes.context,
        assumed,
        [name for name in _NOT_COUNTED if name in arguments and arguments.number(name) != 0],
    )


def _shards_optimizer(arguments: Arguments) -> bool:
    return any(name in arguments for name in ("--use-distributed-optimizer", "--use-megatron-fsdp"))


class _Sizes:
    """The parallel sizes; what depends on the environment counts as 1, and is in `unknown`."""

    def __init__(self, arguments: Arguments):
        self.unknown: dict[str, int] = {}
        self.tensor = self._size(arguments, "--tensor-model-parallel-size")
        self.pipeline = self._size(arguments, "--pipeline-model-parallel-size")
        self.context = self._size(arguments, "--context-parallel-size")
        self.expert = self._size(arguments, "--expert-model-parallel-size")
        self.expert_tensor = self._size(arguments, "--expert-tensor-parallel-size", self.tensor)

    def _size(self, arguments: Arguments, name: str, default: int = 1) -> int:
        size = arguments.number(name)
        if size is None and name in arguments:
            self.unknown[name] = default
        return max(1, size or default)

    @property
    def smallest_world(self) -> int:
        """The fewest ranks that all of them divide."""
        dense = self.tensor * self.context * self.pipeline
        return math.lcm(dense, self.expert_tensor * self.expert * self.pipeline)


def _world_size(arguments: Arguments, sizes: _Sizes, assumed: list[str]) -> int:
    per_node = arguments.number("--nproc-per-node") or arguments.number("--local-worker-num")
    nodes = arguments.number("--nnodes") or (1 if "--nnodes" not in arguments else None)
    smallest = sizes.smallest_world
    if per_node and nodes and per_node * nodes % smallest == 0:
        return per_node * nodes
    why = f"; {per_node * nodes} are named here" if per_node and nodes else ""
    assumed.append(f"{count_of(smallest, 'rank')}, the fewest for these parallel sizes{why}")
    return smallest


def count_of(number: int, what: str) -> str:
    """A number of things, in words."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _vocab_size(arguments: Arguments, tensor_parallel: int) -> int | None:
    if padded := arguments.number("--padded-vocab-size"):
        return padded
    size = arguments.number("--vocab-size")
    if size is None:
        return None
    unit = (arguments.number("--make-vocab-size-divisible-by") or 128) * tensor_parallel
    return -(-size // unit) * unit


def _model_fields(arguments: Arguments) -> dict[str, Any]:
    read = {name: arguments.number(flag(name)) for name in _NUMBERS}
    numbers = {name: number for name, number in read.items() if number is not None}
    wide = 4 * numbers["hidden_size"]
    numbers.setdefault("ffn_hidden_size", int(wide * 2 / 3 / 64) * 64 if "--swiglu" in arguments else wide)
    topk = arguments.number("--moe-router-topk") or 2
    shared = bool(numbers.get("moe_shared_expert_intermediate_size"))
    fields = {
        **{name: value for name, value in numbers.items() if value},
        "num_moe_experts": arguments.number("--num-experts"),
        "moe_layer_freq": moe_pattern(arguments, numbers["num_layers"]),
        "moe_router_topk": topk,
        # No parameter depends on it, and without it a model with one expert a token is refused.
        "moe_router_pre_softmax": topk == 1,
        "num_query_groups": _query_groups(arguments),
        "normalization": "RMSNorm" if arguments.text("--normalization") == "RMSNorm" else "LayerNorm",
        "gated_linear_unit": any(name in arguments for name in _GATED),
        "add_bias_linear": "--disable-bias-linear" not in arguments and not shared,
        "qk_layernorm": "--qk-layernorm" in arguments,
        "add_qkv_bias": "--add-qkv-bias" in arguments,
        "moe_shared_expert_gate": shared and "--moe-shared-expert-gate" in arguments,
        "share_embeddings_and_output_weights": "--untie-embeddings-and-output-weights" not in arguments,
        "expert_backend": "sequential",
    }
    return {**fields, **dict(_latent_fields(arguments))}


_NUMBERS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "ffn_hidden_size",
    "kv_channels",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
)


def _query_groups(arguments: Arguments) -> int | None:
    if "--group-query-attention" not in arguments:
        return None
    return arguments.number("--num-query-groups") or 1


def _latent_fields(arguments: Arguments) -> Iterator[tuple[str, Any]]:
    if "--multi-latent-attention" not in arguments:
        return
    yield "multi_latent_attention", True
    # Megatron-LM's flag has no default for the query; the planner's follows MLATransformerConfig.
    yield "q_lora_rank", arguments.number("--q-lora-rank")
    for name in LatentSizes._fields[1:]:
        if (size := arguments.number(flag(name))) is not None:
            yield name, size
