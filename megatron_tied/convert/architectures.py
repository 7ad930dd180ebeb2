"""The Hugging Face architectures that are read and written, as tables of what their config.json says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_tied.convert.hf_config import (
    CarriedJson,
    ConfigJson,
    DeepseekV2Json,
    DeepseekV3Json,
    OlmoeJson,
    Qwen3MoeJson,
)
from megatron_tied.convert.translations import (
    FIRST_LAYERS_DENSE,
    LATENT_ROPE,
    PLAIN_ROPE,
    RENORMALISED_SOFTMAX,
    ROUTED_SCALING,
    SHARED_EXPERTS,
    SIGMOID_WEIGHTS,
    SPARSE_STEPS,
    Fields,
    Json,
    Translation,
    expert_groups,
    ignored,
    implied,
    latent_rope,
    only,
    refuse,
    same,
)
from megatron_tied.errors import ConfigError, Problem
from megatron_tied.models.config import TRAINING_ONLY_FIELDS, ModelConfig
from megatron_tied.models.latent_attention import is_latent, latent_sizes

# What a compact export calls itself: never a stock model type, whose readers would fill followers with random numbers.
COMPACT_PREFIX = "megatron_tied_"

_COMMON = (
    same("num_hidden_layers", "num_layers"),
    same("hidden_size", "hidden_size"),
    same("num_attention_heads", "num_attention_heads"),
    same("vocab_size", "vocab_size"),
    same("max_position_embeddings", "max_position_embeddings"),
    same("initializer_range", "init_method_std"),
    same("attention_dropout", "attention_dropout"),
    same("tie_word_embeddings", "share_embeddings_and_output_weights"),
    same("num_experts_per_tok", "moe_router_topk"),
    only("hidden_act", "silu", "swish", why="no other activation is known here"),
    only("attention_bias", False, None, why="biases of the attention are not supported"),
    only("quantization_config", None, why="weights must not be quantised: convert them to bf16 first"),
    only("partial_rotary_factor", None, 1, why="the Hugging Face class ignores it"),
    ignored("architectures", "auto_map", "dtype", "torch_dtype"),
    ignored("model_type", "transformers_version", "pretraining_tp", "ep_size"),
    ignored(*CarriedJson.model_fields),
)
_AUX_LOSS = same("router_aux_loss_coef", "moe_aux_loss_coeff")
_NOT_WRITTEN = ("quantization_config", "partial_rotary_factor")


def _read_head_dim(json: Json) -> Fields:
    size = json["head_dim"]
    if size not in (None, json["hidden_size"] // json["num_attention_heads"]):
        raise refuse("head_dim", size, "must be hidden_size / num_attention_heads, as wide as the query norm is")
    return {}


_OLMOE = (
    same("num_key_value_heads", "num_query_groups"),
    same("num_experts", "num_moe_experts"),
    same("intermediate_size", "moe_ffn_hidden_size"),
    same("rms_norm_eps", "layernorm_epsilon"),
    same("clip_qkv", "qkv_clip"),
    Translation(("head_dim",), _read_head_dim, lambda config: {}),
    RENORMALISED_SOFTMAX,
    PLAIN_ROPE,
    _AUX_LOSS,
    implied(qk_layernorm=True, qk_norm_scope="projection"),
)

_QWEN3_MOE = (
    same("num_key_value_heads", "num_query_groups"),
    same("num_experts", "num_moe_experts"),
    same("moe_intermediate_size", "moe_ffn_hidden_size"),
    same("intermediate_size", "ffn_hidden_size"),
    same("head_dim", "kv_channels"),
    same("rms_norm_eps", "layernorm_epsilon"),
    only("use_sliding_window", False, None, why="windowed attention is not supported"),
    RENORMALISED_SOFTMAX,
    SPARSE_STEPS,
    PLAIN_ROPE,
    _AUX_LOSS,
    implied(qk_layernorm=True, qk_norm_scope="head"),
    ignored("sliding_window", "max_window_layers", "layer_types"),
)

_EPSILON = 1e-6


def _read_epsilon(json: Json) -> Fields:
    epsilon = json["rms_norm_eps"]
    if epsilon != _EPSILON:
        valid = f"must be {_EPSILON}, which the Hugging Face class has in the norms of compressed queries and keys"
        raise refuse("rms_norm_eps", epsilon, valid)
    return {"layernorm_epsilon": epsilon}


def _read_key_value_heads(json: Json) -> Fields:
    heads = json["num_key_value_heads"]
    if heads not in (None, json["num_attention_heads"]):
        raise refuse("num_key_value_heads", heads, "must be num_attention_heads: latent attention has one key per head")
    return {}


_LATENT = (
    Translation(
        ("num_key_value_heads",),
        _read_key_value_heads,
        lambda config: {"num_key_value_heads": config.num_attention_heads},
    ),
    Translation(("rms_norm_eps",), _read_epsilon, lambda config: {"rms_norm_eps": config.layernorm_epsilon}),
    same("n_routed_experts", "num_moe_experts"),
    same("moe_intermediate_size", "moe_ffn_hidden_size"),
    same("intermediate_size", "ffn_hidden_size"),
    same("q_lora_rank", "q_lora_rank", null=True),
    same("kv_lora_rank", "kv_lora_rank"),
    same("qk_nope_head_dim", "qk_head_dim"),
    same("qk_rope_head_dim", "qk_pos_emb_head_dim"),
    same("v_head_dim", "v_head_dim"),
    only("moe_layer_freq", 1, why="MoE layers follow the dense ones without a gap"),
    FIRST_LAYERS_DENSE,
    SHARED_EXPERTS,
    ROUTED_SCALING,
    LATENT_ROPE,
    # The Hugging Face classes compute router logits in fp32.
    implied(multi_latent_attention=True, qk_layernorm=True, moe_router_dtype="fp32"),
    ignored("head_dim", "qk_head_dim", "aux_loss_alpha", "seq_aux", "router_aux_loss_coef"),
)

_DEEPSEEK_V2 = (
    *_LATENT,
    only("norm_topk_prob", False, None, why="the Hugging Face class never renormalises"),
    only("scoring_func", "softmax", why="this architecture's router"),
    only("mlp_bias", False, None, why="biases are not supported"),
    expert_groups(
        1,
        lambda json: json["topk_method"] != "greedy",
        lambda limited: "group_limited_greedy" if limited else "greedy",
    ),
    implied(moe_router_pre_softmax=True),
)

_DEEPSEEK_V3 = (
    *_LATENT,
    SIGMOID_WEIGHTS,
    only("scoring_func", "sigmoid", why="this architecture's router"),
    only("rope_interleave", True, why="Megatron-Core pairs neighbouring rotary dimensions"),
    expert_groups(2, lambda json: True, lambda limited: "noaux_tc"),
    # What is written predicts no further tokens; of what is read that is left out, as the Hugging Face class does.
    Translation((), lambda json: {}, lambda config: {"num_nextn_predict_layers": 0}),
    implied(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True),
)


@dataclass(frozen=True)
class Architecture:
    """A stock Hugging Face architecture: its model type, the causal language model's class, its config's table."""

    model_type: str
    causal_lm: str
    schema: type[ConfigJson]
    translations: tuple[Translation, ...]

    def read(self, json: Json) -> ModelConfig:
        """Our config of the model that `json` describes. Raises `ConfigError` naming every key in the way."""
        complete = self.schema.complete(json)
        fields: Fields = {}
        problems: list[Problem] = []
        for translation in self.translations:
            try:
                fields |= translation.read(complete)
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError(problems)
        config = ModelConfig.resolve(fields | {"expert_backend": "sequential"})
        # The faster backend, where its kernel takes these sizes.
        grouped = config.model_copy(update={"expert_backend": "grouped"})
        return config if grouped.problems() else grouped

    def unknown(self, json: Json) -> list[str]:
        """The keys of `json` that the table does not speak about."""
        known = {key for translation in self.translations for key in translation.keys} | self.schema.renamed.keys()
        return sorted(key for key in json if key not in known and not key.startswith("_"))

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """config.json of `config`. Raises `ConfigError` naming every field that it cannot express."""
        json: dict[str, Any] = {"architectures": [self.causal_lm], "model_type": self.model_type}
        for translation in self.translations:
            json |= translation.write(config)
        json = {key: value for key, value in json.items() if key not in _NOT_WRITTEN}
        if isinstance(json.get("router_aux_loss_coef"), list):
            del json["router_aux_loss_coef"]
        self._read_back(json, config)
        return json

    def _read_back(self, json: Json, config: ModelConfig) -> None:
        ours, back = _computed(config), _computed(self.read(json))
        different = sorted(name for name in ours.keys() | back.keys() if ours.get(name) != back.get(name))
        if different:
            must = {name: f"must be {back[name]!r}" if name in back else "must be left out" for name in different}
            why = f"in a Hugging Face {self.model_type} model, which is the nearest to this one"
            raise ConfigError([Problem(f"model.{name}", ours.get(name), f"{must[name]} {why}") for name in different])


ARCHITECTURES: Mapping[str, Architecture] = {
    architecture.model_type: architecture
    for architecture in (
        Architecture("olmoe", "OlmoeForCausalLM", OlmoeJson, (*_COMMON, *_OLMOE)),
        Architecture("qwen3_moe", "Qwen3MoeForCausalLM", Qwen3MoeJson, (*_COMMON, *_QWEN3_MOE)),
        Architecture("deepseek_v2", "DeepseekV2ForCausalLM", DeepseekV2Json, (*_COMMON, *_DEEPSEEK_V2)),
        Architecture("deepseek_v3", "DeepseekV3ForCausalLM", DeepseekV3Json, (*_COMMON, *_DEEPSEEK_V3)),
    )
}


def architecture_named(model_type: object) -> Architecture:
    """The architecture of a config.json, compact or not. Raises `ConfigError` for one that is not known."""
    stock = model_type.removeprefix(COMPACT_PREFIX) if isinstance(model_type, str) else ""
    if stock not in ARCHITECTURES:
        raise refuse("model_type", model_type, f"must be one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[stock]


def architecture_of(config: ModelConfig) -> Architecture:
    """The Hugging Face architecture that can be `config`, judged by its attention and its router."""
    if is_latent(config):
        return ARCHITECTURES["deepseek_v3" if config.moe_router_score_function == "sigmoid" else "deepseek_v2"]
    if config.qk_layernorm:
        return ARCHITECTURES["olmoe" if config.qk_norm_scope == "projection" else "qwen3_moe"]
    valid = "must be true for an export: none of the Hugging Face architectures here is without"
    raise ConfigError(Problem("model.qk_layernorm", config.qk_layernorm, valid))


def _computed(config: ModelConfig) -> dict[str, Any]:
    """What decides the model's logits and the meaning of its weights; no Nones."""
    fields = config.model_dump() | {"moe_layer_freq": config.moe_layers()}
    unused = {"ffn_hidden_size"} if len(config.moe_layers()) == config.num_layers else set()
    if is_latent(config):
        # Its heads have widths of their own.
        unused |= {"kv_channels", "num_query_groups"}
        fields |= latent_sizes(config)._asdict() | latent_rope(config)
    return {
        name: value
        for name, value in fields.items()
        if value is not None and name not in TRAINING_ONLY_FIELDS and name not in unused
    }
