"""Keys of config.json that are read here, by architecture: their types, and what its Hugging Face class takes for them.

Nothing else looks at a config.json before this has: translations and checks find every key, of its type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_tied.errors import ConfigError, Problem

# Of each layer and expert there are names to be made: more than this is a mistake, and would fill the memory.
_MOST_LAYERS, _MOST_EXPERTS = 1000, 4096
_MOST = 2**31 - 1

Natural = Annotated[int, Field(ge=0, le=_MOST)]
Count = Annotated[int, Field(gt=0, le=_MOST)]
Layers = Annotated[int, Field(gt=0, le=_MOST_LAYERS)]
Experts = Annotated[int, Field(gt=0, le=_MOST_EXPERTS)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
# Some models say -1 for none.
TokenId = Annotated[int, Field(ge=-1, le=_MOST)]

_STRICT = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _RopeJson(BaseModel):
    model_config = _STRICT

    rope_theta: Positive | None = None
    rope_type: str | None = None
    type: str | None = None
    factor: Positive | None = None
    original_max_position_embeddings: Count | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    mscale: NonNegative | None = None
    mscale_all_dim: NonNegative | None = None


class ConfigJson(BaseModel):
    """What the architectures have in common. Other keys may be there, too, and are not looked at."""

    model_config = _STRICT
    # Other names of keys, which their classes take as well.
    renamed: ClassVar[dict[str, str]] = {}

    num_hidden_layers: Layers
    hidden_size: Count
    num_attention_heads: Count
    vocab_size: Count
    max_position_embeddings: Count
    initializer_range: Positive = 0.02
    attention_dropout: Share = 0.0
    tie_word_embeddings: bool = False
    rope_theta: Positive | None = None
    rope_scaling: _RopeJson | None = None
    rope_parameters: _RopeJson | None = None

    @classmethod
    def complete(cls, json: Mapping[str, Any]) -> dict[str, Any]:
        """`json` with its keys' usual names, and with all that it leaves out. Raises `ConfigError` for wrong types."""
        usual = cls._with_usual_names(json)
        try:
            found = cls.model_validate(usual)
        except ValidationError as error:
            raise ConfigError(_problems(error)) from None
        CarriedJson.check(usual, vocab_size=found.vocab_size)
        return {name: getattr(found, name) for name in cls.model_fields} | usual

    @classmethod
    def computing(cls, json: Mapping[str, Any]) -> dict[str, Any]:
        """Of `json` the keys that say what the model computes, as they are."""
        return {key: value for key, value in json.items() if key in cls.model_fields or key in cls.renamed}

    @classmethod
    def _with_usual_names(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        json = dict(given)
        for other, usual in cls.renamed.items():
            if other not in json:
                continue
            value = json.pop(other)
            if json.setdefault(usual, value) != value:
                raise ConfigError(Problem(f"config.json: {other}", value, f"must be {usual}, which is {json[usual]!r}"))
        return json


class CarriedJson(BaseModel):
    """What does not change what is computed, and goes from an imported model to its export, and of a compact one."""

    model_config = _STRICT

    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    pad_token_id: TokenId | None = None
    use_cache: bool = True
    output_router_logits: bool = False
    num_nextn_predict_layers: Natural | None = None
    num_mtp_layers: Natural | None = None
    expert_banks: list[Natural | None] | None = None
    num_tied_experts: Experts | None = None

    @classmethod
    def check(cls, json: Mapping[str, Any], *, vocab_size: int, file: str = "config.json") -> None:
        """Raise `ConfigError` for wrong types, and for tokens that a model of `vocab_size` does not know."""
        try:
            found = cls.model_validate(json)
        except ValidationError as error:
            raise ConfigError(_problems(error, file)) from None
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(found, key)
            if any(token >= vocab_size for token in (value if isinstance(value, list) else [value or 0])):
                raise ConfigError(Problem(f"{file}: {key}", value, f"must be below vocab_size, {vocab_size}"))


class OlmoeJson(ConfigJson):
    """OlmoeConfig."""

    renamed: ClassVar = {"num_local_experts": "num_experts"}

    num_hidden_layers: Layers = 16
    hidden_size: Count = 2048
    intermediate_size: Count = 2048
    num_attention_heads: Count = 16
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    vocab_size: Count = 50_304
    max_position_embeddings: Count = 4096
    rms_norm_eps: Positive = 1e-5
    clip_qkv: Positive | None = None
    num_experts: Experts = 64
    num_experts_per_tok: Count = 8
    norm_topk_prob: bool = False
    router_aux_loss_coef: NonNegative = 0.01


class Qwen3MoeJson(ConfigJson):
    """Qwen3MoeConfig."""

    renamed: ClassVar = {"num_local_experts": "num_experts"}

    num_hidden_layers: Layers = 24
    hidden_size: Count = 2048
    intermediate_size: Count = 6144
    moe_intermediate_size: Count = 768
    num_attention_heads: Count = 32
    num_key_value_heads: Count = 4
    head_dim: Count | None = None
    vocab_size: Count = 151_936
    max_position_embeddings: Count = 32_768
    rms_norm_eps: Positive = 1e-6
    decoder_sparse_step: Count = 1
    mlp_only_layers: list[Natural] | None = None
    num_experts: Experts = 128
    num_experts_per_tok: Count = 8
    norm_topk_prob: bool = False
    router_aux_loss_coef: NonNegative = 0.001


class _LatentJson(ConfigJson):
    renamed: ClassVar = {"num_experts": "n_routed_experts", "num_local_experts": "n_routed_experts"}

    rms_norm_eps: Positive = 1e-6
    q_lora_rank: Count | None = 1536
    kv_lora_rank: Count = 512
    qk_nope_head_dim: Count = 128
    qk_rope_head_dim: Count = 64
    v_head_dim: Count = 128


class DeepseekV2Json(_LatentJson):
    """DeepseekV2Config."""

    num_hidden_layers: Layers = 32
    hidden_size: Count = 4096
    intermediate_size: Count = 11_008
    moe_intermediate_size: Count = 1407
    num_attention_heads: Count = 32
    num_key_value_heads: Count | None = None
    vocab_size: Count = 102_400
    max_position_embeddings: Count = 2048
    first_k_dense_replace: Natural = 0
    n_routed_experts: Experts = 64
    n_shared_experts: Natural | None = 2
    # The class's own None is nothing that can be computed with.
    num_experts_per_tok: Count
    routed_scaling_factor: Positive = 1.0
    topk_method: Literal["greedy", "group_limited_greedy"] = "greedy"
    n_group: Count | None = None
    topk_group: Count | None = None
    norm_topk_prob: bool | None = False


class DeepseekV3Json(_LatentJson):
    """DeepseekV3Config."""

    num_hidden_layers: Layers = 61
    hidden_size: Count = 7168
    intermediate_size: Count = 18_432
    moe_intermediate_size: Count = 2048
    num_attention_heads: Count = 128
    num_key_value_heads: Count | None = 128
    vocab_size: Count = 129_280
    max_position_embeddings: Count = 4096
    first_k_dense_replace: Natural = 3
    n_routed_experts: Experts = 256
    n_shared_experts: Natural | None = 1
    num_experts_per_tok: Count = 8
    routed_scaling_factor: Positive = 2.5
    n_group: Count = 8
    topk_group: Count = 4
    norm_topk_prob: bool = True


def _problems(error: ValidationError, file: str = "config.json") -> list[Problem]:
    """One problem per key; what the members of a union each want is joined by "or"."""
    wants: dict[str, list[str]] = {}
    values: dict[str, object] = {}
    for item in error.errors(include_url=False):
        place = item["loc"][: 2 if str(item["loc"][0]).startswith("rope_") else 1]
        key = ": ".join(map(str, place))
        missing = item["type"] == "missing"
        want = "given" if missing else item["msg"].removeprefix("Input should be ").partition(" or instance of")[0]
        wants.setdefault(key, []).append(want)
        values.setdefault(key, None if missing else item["input"])
    return [
        Problem(f"{file}: {key}", values[key], f"must be {' or '.join(dict.fromkeys(want))}")
        for key, want in wants.items()
    ]
