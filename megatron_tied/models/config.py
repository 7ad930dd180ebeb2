"""The `model` section of a config: Megatron-Core's field names, a preset, and a few fields of our own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.models.latent_attention import is_latent, latent_problems
from megatron_tied.models.presets import preset_fields
from megatron_tied.topology import TieConfig, TieTopology, moe_layers

Balancing = Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none"]

# Ours, or arguments of GPTModel: everything else in ModelConfig is a field of TransformerConfig.
_NOT_TRANSFORMER_FIELDS = frozenset(
    {
        "preset",
        "scale",
        "activation",
        "init_method",
        "expert_backend",
        "qk_norm_scope",
        "qkv_clip",
        "vocab_size",
        "max_position_embeddings",
        "rotary_base",
        "rotary_percent",
        "share_embeddings_and_output_weights",
    }
)

# TransformerConfig fields that follow from another key of the config file.
_SAID_ELSEWHERE = {
    "activation_func": "model.activation",
    "moe_grouped_gemm": "model.expert_backend",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "params_dtype": "train.precision",
    "expert_model_parallel_size": "parallel.expert_model_parallel_size",
    "tensor_model_parallel_size": "parallel.tensor_model_parallel_size",
    "pipeline_model_parallel_size": "parallel.pipeline_model_parallel_size",
}

# A field, what is true where it is wrong, and what would be valid.
_Check = tuple[str, object, str]

# How a model is computed and regularised, not what it is: these may change between runs with the same weights.
TRAINING_ONLY_FIELDS = {
    *("preset", "scale", "expert_backend", "moe_token_dispatcher_type"),
    *("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules"),
    *("hidden_dropout", "attention_dropout", "moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_router_bias_update_rate"),
    *(
        "init_method",
        "init_method_std",
        "moe_router_load_balancing_type",
        "moe_router_dtype",
        "moe_expert_capacity_factor",
    ),
    *("moe_permute_fusion", "moe_router_fusion", "moe_shared_expert_overlap", "masked_softmax_fusion"),
    *("bias_activation_fusion", "bias_dropout_fusion", "cross_entropy_loss_fusion", "deterministic_mode"),
}

# torch.nn.functional.grouped_mm wants row strides that are multiples of 16 bytes, which is 8 bf16 numbers.
_GROUPED_ALIGNMENT = 8


class ModelConfig(BaseModel):
    """A Mixture-of-Experts language model. Any other field of TransformerConfig is kept and passed on.

    Defaults are Megatron-Core's, except where every current MoE language model does otherwise: RMSNorm,
    SwiGLU, no biases, no dropout, all-to-all dispatch. Sizes are counts of numbers, not bytes; those left out,
    or null, are derived as Megatron-Core derives them.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="allow", use_attribute_docstrings=True)

    preset: str | None = None
    """A named model, of which any field can be replaced: olmoe, qwen3_moe, deepseek, quickstart, or a published one."""
    scale: str | None = None
    """Its size, where it has several: regular, small, tiny."""
    num_layers: PositiveInt
    """Transformer layers, dense ones included."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    # `get`: pydantic before 2.14 asks also where one of these is wrong, which is told already.
    ffn_hidden_size: PositiveInt = Field(default_factory=lambda given: 4 * given.get("hidden_size", 1))
    """Width of dense layers; left out: 4 x hidden_size."""
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """Of all norms."""
    layernorm_epsilon: PositiveFloat = 1e-5
    """Of all norms."""
    activation: Literal["silu", "gelu"] = "silu"
    """Of experts and dense layers."""
    gated_linear_unit: bool = True
    """Gate and up projection, as in SwiGLU."""
    add_bias_linear: bool = False
    """Biases of linear layers; not with grouped or shared experts."""
    hidden_dropout: NonNegativeFloat = 0.0
    """Share of the outputs of attention and MoE that is dropped in training."""
    init_method: Literal["normal", "depth_scaled_xavier"] = "normal"
    """normal, with init_method_std; or Xavier's uniform with gain 1 / sqrt(3 num_layers), of query, key, value and each
    expert's matrices for themselves, of which gate and up are one ("Tying the Loop", arXiv:2606.16825)."""
    init_method_std: PositiveFloat = 0.02
    """Standard deviation of initial weights."""
    num_attention_heads: PositiveInt
    """Query heads."""
    num_query_groups: PositiveInt = Field(default_factory=lambda given: given.get("num_attention_heads", 1))
    """Heads of keys and values; left out: as many as query heads."""
    kv_channels: PositiveInt = Field(
        default_factory=lambda given: given.get("hidden_size", 1) // given.get("num_attention_heads", 1)
    )
    """Width of a head; left out: hidden_size / num_attention_heads."""
    add_qkv_bias: bool = False
    """Biases of query, key and value."""
    attention_dropout: NonNegativeFloat = 0.0
    """Share of the attention weights that is dropped in training."""
    qk_layernorm: bool = False
    """Norms of queries and keys."""
    qk_norm_scope: Literal["head", "projection"] = "head"
    """One norm per head as wide as the head (Qwen3), or one over the whole projection (OLMoE)."""
    qkv_clip: PositiveFloat | None = None
    """Clamps the entries of q, k and v to [-qkv_clip, qkv_clip]."""
    num_moe_experts: PositiveInt
    """Routed experts of an untied MoE layer."""
    moe_ffn_hidden_size: PositiveInt = Field(default_factory=lambda given: given.get("ffn_hidden_size", 1))
    """Width of an expert; left out: ffn_hidden_size."""
    moe_layer_freq: PositiveInt | list[Literal[0, 1]] = 1
    """Every how many layers one is MoE, from the first on; or 1 (MoE) and 0 (dense) for each layer."""
    moe_shared_expert_intermediate_size: PositiveInt | None = None
    """Width of the shared experts of a layer together; null: none."""
    moe_shared_expert_gate: bool = False
    """Weighs the shared experts' output by a gate."""
    moe_router_topk: PositiveInt = 2
    """Experts of a token."""
    moe_router_pre_softmax: bool = False
    """Softmax over all experts before the choice, not over those chosen."""
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    """What makes a router's scores of its logits."""
    moe_router_enable_expert_bias: bool = False
    """Balances the load by a bias of the choice, without a loss (DeepSeek-V3); needs sigmoid."""
    moe_router_load_balancing_type: Balancing | list[Balancing] = "aux_loss"
    """The loss that balances the load, or several."""
    moe_aux_loss_coeff: NonNegativeFloat | list[NonNegativeFloat] = 0.0
    """Weight of that loss, or a list of as many."""
    moe_z_loss_coeff: NonNegativeFloat | None = None
    """Weight of the loss on the size of a router's logits; null: none."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens travel to the ranks of their experts and back."""
    expert_backend: Literal["grouped", "sequential", "te"] = "grouped"
    """What multiplies: torch's grouped products, one product an expert, or Transformer Engine's."""
    vocab_size: PositiveInt | None = None
    """Null: the tokenizer's."""
    max_position_embeddings: PositiveInt | None = None
    """Longest sequence; null: that of the training run."""
    rotary_base: PositiveInt = 10_000
    """Of rotary position embeddings."""
    rotary_percent: PositiveFloat = 1.0
    """Share of a head's channels that are rotated."""
    share_embeddings_and_output_weights: bool = False
    """One matrix for both."""

    @classmethod
    def resolve(cls, mapping: Mapping[str, Any]) -> ModelConfig:
        """Reads a `model` section: the preset's fields, overridden by the keys of `mapping`.

        The result is coherent in itself; whether its extra keys exist, `unknown_fields` says. Raises
        ConfigError with every problem found, named model.*.
        """
        merged = dict(mapping)
        if mapping.get("preset") is not None:
            merged = preset_fields(mapping["preset"], mapping.get("scale")) | {
                key: value for key, value in mapping.items() if key not in ("preset", "scale")
            }
        elif mapping.get("scale") is not None:
            raise ConfigError(Problem("model.scale", mapping["scale"], "must come with a model.preset"))
        try:
            config = cls.model_validate(merged)
        except ValidationError as error:
            raise ConfigError(_field_problems(error, merged)) from None
        if problems := config.problems():
            raise ConfigError(problems)
        return config

    @model_validator(mode="before")
    @classmethod
    def _derive_what_is_null(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        derived = {name for name, field in cls.model_fields.items() if field.default_factory is not None}
        return {name: value for name, value in given.items() if value is not None or name not in derived}

    def moe_layers(self) -> tuple[int, ...]:
        """The layers that are not dense, from 0."""
        return moe_layers(self.moe_layer_freq, self.num_layers)

    def topology(self, tie: TieConfig) -> TieTopology:
        """The expert banks of this model under `tie`. Raises ConfigError if they do not fit together."""
        topology = TieTopology.build(tie, self.num_layers, self.moe_layers())
        if tie.num_tied_experts is not None and tie.num_tied_experts < self.moe_router_topk:
            valid = f"must be at least model.moe_router_topk = {self.moe_router_topk}"
            raise ConfigError(Problem("tie.num_tied_experts", tie.num_tied_experts, valid))
        if tie.weight_gradient == "fused" and self.expert_backend != "grouped":
            valid = f"must be auto or immediate with model.expert_backend = {self.expert_backend!r}"
            raise ConfigError(Problem("tie.weight_gradient", tie.weight_gradient, valid))
        return topology

    def cut_by_tensor_parallelism(self) -> dict[str, int]:
        """What tensor parallel ranks divide evenly, by its key: heads, vocabulary, width of dense and shared MLPs."""
        has_dense_layers = len(self.moe_layers()) < self.num_layers
        names = ["num_attention_heads", "num_query_groups", "vocab_size", "moe_shared_expert_intermediate_size"]
        names += ["ffn_hidden_size"] if has_dense_layers else []
        return {f"model.{name}": count for name in names if (count := getattr(self, name)) is not None}

    def transformer_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of TransformerConfig; `activation_func` is missing: `activation` names it."""
        fields = self.model_dump(exclude=set(_NOT_TRANSFORMER_FIELDS))
        return fields | {"moe_grouped_gemm": self.expert_backend != "sequential"}

    def has_fused_activation(self) -> bool:
        """Whether Megatron-Core's fused activations compute what this says in all kinds of MLPs, and not an error.

        Its fused gelu is an approximation, and what its experts fuse knows no biases, bounds and offsets.
        """
        altered = any(self._extra.get(name) for name in ("activation_func_clamp_value", "glu_linear_offset"))
        return self.activation == "silu" and self.gated_linear_unit and not (self.add_bias_linear or altered)

    def unknown_fields(self, transformer_config_fields: Iterable[str]) -> list[Problem]:
        """The keys that are neither ours nor in `transformer_config_fields`, with the nearest name."""
        known = {*transformer_config_fields, *type(self).model_fields}
        problems = []
        for name in sorted(self._extra.keys() - known):
            close = get_close_matches(name, sorted(known), n=1)
            hint = f"; did you mean model.{close[0]}?" if close else ""
            problems.append(Problem(f"model.{name}", self._extra[name], f"is not a model option{hint}"))
        return problems

    def problems(self) -> list[Problem]:
        """What is wrong between fields that are each valid alone."""
        checks = (*self._attention_checks(), *self._latent_checks(), *self._expert_checks(), *self._layer_checks())
        found = [Problem(f"model.{name}", getattr(self, name), valid) for name, is_wrong, valid in checks if is_wrong]
        return found + latent_problems(self)

    def _attention_checks(self) -> Iterator[_Check]:
        # Latent attention has widths of its own.
        if not is_latent(self):
            yield (
                "num_attention_heads",
                "kv_channels" not in self.model_fields_set and self.hidden_size % self.num_attention_heads,
                f"must divide model.hidden_size = {self.hidden_size}, or give model.kv_channels",
            )
            yield "kv_channels", self.kv_channels % 2, "must be even, for rotary position embeddings"
        yield (
            "num_query_groups",
            self.num_attention_heads % self.num_query_groups,
            f"must divide model.num_attention_heads = {self.num_attention_heads}",
        )
        yield "rotary_percent", self.rotary_percent > 1, "must be at most 1"
        yield (
            "qk_norm_scope",
            self.qk_norm_scope == "projection" and not (self.qk_layernorm and self.normalization == "RMSNorm"),
            'must be "head" unless model.qk_layernorm is true and model.normalization is "RMSNorm"',
        )

    def _latent_checks(self) -> Iterator[_Check]:
        if not is_latent(self):
            return
        heads = self.num_attention_heads
        yield (
            "num_query_groups",
            self.num_query_groups != heads,
            f"must be model.num_attention_heads = {heads}: latent attention has a key for every head",
        )
        no_effect = "must be left out: it has no effect on latent attention"
        yield "qk_norm_scope", self.qk_norm_scope != "head", no_effect
        yield "qkv_clip", self.qkv_clip is not None, no_effect
        yield "add_qkv_bias", self.add_qkv_bias, no_effect

    def _expert_checks(self) -> Iterator[_Check]:
        is_grouped = self.expert_backend == "grouped"
        has_shared_experts = self.moe_shared_expert_intermediate_size is not None
        yield (
            "moe_router_topk",
            self.moe_router_topk > self.num_moe_experts,
            f"must be at most model.num_moe_experts = {self.num_moe_experts}",
        )
        yield (
            "moe_router_pre_softmax",
            self.moe_router_topk == 1
            and self.moe_router_score_function == "softmax"
            and not self.moe_router_pre_softmax,
            "must be true with model.moe_router_topk = 1: softmax over one expert has no gradient",
        )
        yield (
            "moe_router_enable_expert_bias",
            self.moe_router_enable_expert_bias and self.moe_router_score_function != "sigmoid",
            'needs model.moe_router_score_function = "sigmoid"',
        )
        yield (
            "moe_aux_loss_coeff",
            _length(self.moe_router_load_balancing_type) != _length(self.moe_aux_loss_coeff),
            "must be one number per entry of model.moe_router_load_balancing_type",
        )
        yield (
            "moe_shared_expert_gate",
            self.moe_shared_expert_gate and not has_shared_experts,
            "needs shared experts: model.moe_shared_expert_intermediate_size",
        )
        yield (
            "add_bias_linear",
            self.add_bias_linear and (is_grouped or has_shared_experts),
            'must be false with shared experts or model.expert_backend = "grouped"',
        )
        for name in ("hidden_size", "moe_ffn_hidden_size"):
            yield (
                name,
                is_grouped and getattr(self, name) % _GROUPED_ALIGNMENT,
                f'must be a multiple of {_GROUPED_ALIGNMENT} with model.expert_backend = "grouped"',
            )

    def _layer_checks(self) -> Iterator[_Check]:
        freq = self.moe_layer_freq
        yield (
            "moe_layer_freq",
            isinstance(freq, list) and len(freq) != self.num_layers,
            f"must have one entry per layer: model.num_layers = {self.num_layers}",
        )
        yield (
            "recompute_num_layers",
            self._extra.get("recompute_method") == "uniform"
            and self.num_layers % (self._extra.get("recompute_num_layers") or 1),
            f"must divide model.num_layers = {self.num_layers} with model.recompute_method = uniform",
        )
        for name, key in _SAID_ELSEWHERE.items():
            yield name, name in self._extra, f"is set by {key}"

    @property
    def _extra(self) -> dict[str, Any]:
        return self.model_extra or {}


def indivisible(
    field: str, size: int, divided: Mapping[str, int], hints: Mapping[str, str] | None = None
) -> list[Problem]:
    """A problem for each count in `divided` that `size`, the value of `field`, does not divide.

    What `hints` has for a count is said behind what would be valid.
    """
    common = math.gcd(*divided.values())
    valid = ", ".join(str(divisor) for divisor in range(1, common + 1) if common % divisor == 0)
    return [
        Problem(field, size, f"must divide {name} = {count}; valid: {valid}{(hints or {}).get(name, '')}")
        for name, count in divided.items()
        if count % size
    ]


def _length(value: object) -> int | None:
    return len(value) if isinstance(value, list) else None


def _field_problems(error: ValidationError, mapping: Mapping[str, Any]) -> list[Problem]:
    """One problem per field; what the members of a union each want is joined by "or"."""
    wants: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        if item["type"] == "default_factory_not_called":  # which follows from another problem
            continue
        missing = item["type"] == "missing"
        want = "given, here or by a model.preset" if missing else item["msg"].removeprefix("Input should be ")
        wants.setdefault(str(item["loc"][0]), []).append(want)
    return [Problem(f"model.{name}", mapping.get(name), f"must be {' or '.join(want)}") for name, want in wants.items()]
