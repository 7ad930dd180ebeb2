"""What keys of a Hugging Face `config.json` say in our model section: small translations, each in both directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.models.config import ModelConfig
from megatron_tied.models.latent_attention import LatentSizes, is_latent, latent_sizes

Json = Mapping[str, Any]
Fields = dict[str, Any]


@dataclass(frozen=True)
class Translation:
    """Some `keys` of config.json and our fields that mean the same.

    `read` raises `ConfigError` for a value that Megatron-Core cannot express. What `write` cannot express is found by
    reading back what it wrote.
    """

    keys: tuple[str, ...]
    read: Callable[[Json], Fields]
    write: Callable[[ModelConfig], Fields]


def refuse(key: str, value: object, valid: str) -> ConfigError:
    """The error for a value of config.json."""
    return ConfigError(Problem(f"config.json: {key}", value, valid))


def field_value(config: ModelConfig, name: str) -> Any:
    """A field of `config`, be it ours or one that is passed on; None for one that is not given and has no default."""
    if is_latent(config) and name in LatentSizes._fields:
        return getattr(latent_sizes(config), name)
    return getattr(config, name) if name in type(config).model_fields else (config.model_extra or {}).get(name)


def same(key: str, field: str, *, null: bool = False) -> Translation:
    """One key that is one field; of which null says something, or else leaves the field out."""

    def read(json: Json) -> Fields:
        return {field: json[key]} if null or json[key] is not None else {}

    return Translation((key,), read, lambda config: {key: field_value(config, field)})


def only(key: str, *values: object, why: str) -> Translation:
    """A key that can have only these values here; the first is written, and taken where there is none."""

    def read(json: Json) -> Fields:
        if json.get(key, values[0]) in values:
            return {}
        raise refuse(key, json[key], f"must be {' or '.join(map(repr, values))}: {why}")

    return Translation((key,), read, lambda config: {key: values[0]})


def implied(**fields: object) -> Translation:
    """Fields that the architecture has without saying so."""
    return Translation((), lambda json: dict(fields), lambda config: {})


def ignored(*keys: str) -> Translation:
    """Keys that have no effect on what the model computes."""
    return Translation(keys, lambda json: {}, lambda config: {})


# Softmax over the chosen experts is the renormalised softmax over all.
RENORMALISED_SOFTMAX = Translation(
    ("norm_topk_prob",),
    lambda json: {"moe_router_pre_softmax": not json["norm_topk_prob"]},
    lambda config: {"norm_topk_prob": not config.moe_router_pre_softmax},
)


def layer_pattern(
    keys: tuple[str, ...], is_moe: Callable[[Json, int], bool], write: Callable[[ModelConfig], Fields]
) -> Translation:
    """Which layers are MoE layers; `is_moe` tells it of a layer, from 0."""

    def read(json: Json) -> Fields:
        pattern = [int(is_moe(json, layer)) for layer in range(json["num_hidden_layers"])]
        if not any(pattern):
            raise refuse(keys[-1], json[keys[-1]], "must leave an MoE layer: this model has none")
        return {"moe_layer_freq": 1 if all(pattern) else pattern}

    return Translation(keys, read, write)


def _sparse_step(json: Json, layer: int) -> bool:
    only_mlp = json["mlp_only_layers"] or ()
    return layer not in only_mlp and (layer + 1) % json["decoder_sparse_step"] == 0


def _dense_layers(config: ModelConfig) -> list[int]:
    return sorted(set(range(config.num_layers)) - set(config.moe_layers()))


SPARSE_STEPS = layer_pattern(
    ("decoder_sparse_step", "mlp_only_layers"),
    _sparse_step,
    lambda config: {"decoder_sparse_step": 1, "mlp_only_layers": _dense_layers(config)},
)
FIRST_LAYERS_DENSE = layer_pattern(
    ("first_k_dense_replace",),
    lambda json, layer: layer >= json["first_k_dense_replace"],
    lambda config: {"first_k_dense_replace": config.moe_layers()[0]},
)


def _read_shared(json: Json) -> Fields:
    experts = json["n_shared_experts"]
    if not experts:
        raise refuse("n_shared_experts", experts, "must be at least 1: the Hugging Face class has shared experts")
    return {"moe_shared_expert_intermediate_size": experts * json["moe_intermediate_size"]}


SHARED_EXPERTS = Translation(
    ("n_shared_experts",),
    _read_shared,
    lambda config: {
        "n_shared_experts": (config.moe_shared_expert_intermediate_size or 0) // config.moe_ffn_hidden_size
    },
)

_SCALING = "moe_router_topk_scaling_factor"
ROUTED_SCALING = Translation(
    ("routed_scaling_factor",),
    lambda json: {} if json["routed_scaling_factor"] == 1 else {_SCALING: json["routed_scaling_factor"]},
    lambda config: {"routed_scaling_factor": field_value(config, _SCALING) or 1.0},
)


def _read_sigmoid_weights(json: Json) -> Fields:
    renormalised, top_k = json["norm_topk_prob"], json["num_experts_per_tok"]
    if renormalised != (top_k != 1):
        valid = "must be true, or false with one expert per token: so Megatron-Core weights sigmoid scores"
        raise refuse("norm_topk_prob", renormalised, valid)
    return {}


SIGMOID_WEIGHTS = Translation(
    ("norm_topk_prob",), _read_sigmoid_weights, lambda config: {"norm_topk_prob": config.moe_router_topk > 1}
)


def expert_groups(best_of_group: int, limited: Callable[[Json], bool], method: Callable[[bool], str]) -> Translation:
    """Routing to some groups of experts only, chosen by the sum of each group's `best_of_group` best scores.

    Megatron-Core sums as many as a token has experts in a chosen group. `limited` tells whether a config.json limits
    at all, `method` what it then calls that.
    """

    def read(json: Json) -> Fields:
        if not limited(json):
            return {}
        groups, chosen, experts = json["n_group"], json["topk_group"], json["n_routed_experts"]
        if groups is None or experts % groups or experts // groups < best_of_group:
            valid = f"must divide n_routed_experts, {experts}, into groups of at least {best_of_group}"
            raise refuse("n_group", groups, valid)
        if chosen is None or chosen > groups:
            raise refuse("topk_group", chosen, f"must be at most n_group, {groups}")
        if chosen == groups:
            return {}
        if json["num_experts_per_tok"] // chosen != best_of_group:
            valid = f"must be such that num_experts_per_tok // topk_group is {best_of_group}: the number of scores by"
            raise refuse("topk_group", chosen, f"{valid} which Megatron-Core and this architecture both rank a group")
        return {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}

    def write(config: ModelConfig) -> Fields:
        groups = field_value(config, "moe_router_num_groups")
        chosen = field_value(config, "moe_router_group_topk")
        return {"n_group": groups or 1, "topk_group": chosen or 1, "topk_method": method(bool(groups))}

    return Translation(("n_group", "topk_group", "topk_method"), read, write)


_DEFAULT_THETA = 10_000.0


class _Rope:
    """Rotary embeddings as config.json has them: rope_theta and rope_scaling, or, since 5, rope_parameters."""

    keys = ("rope_theta", "rope_scaling", "rope_parameters")

    def __init__(self, json: Json):
        # As transformers chooses where both are given.
        self.key = "rope_scaling" if json["rope_scaling"] else "rope_parameters"
        self.settings: Fields = dict(json[self.key] or {})
        theta = self.settings.pop("rope_theta", None) or json["rope_theta"] or _DEFAULT_THETA
        if theta != int(theta):
            raise refuse(f"{self.key}: rope_theta", theta, "must be a whole number")
        self.theta = int(theta)
        kinds = [self.settings.pop(name, None) for name in ("rope_type", "type")]
        self.kind = next(filter(None, kinds), "default")

    def refuse_rest(self) -> None:
        left = {name: value for name, value in self.settings.items() if value is not None}
        if left:
            raise refuse(self.key, left, "cannot be expressed: remove these, or convert another model")


def _read_plain_rope(json: Json) -> Fields:
    rope = _Rope(json)
    if rope.kind != "default":
        raise refuse(rope.key, rope.kind, 'must be "default": Megatron-Core stretches none for this attention')
    rope.refuse_rest()
    return {"rotary_base": rope.theta}


def _write_plain_rope(config: ModelConfig) -> Fields:
    return {"rope_theta": float(config.rotary_base), "rope_scaling": None}


# Rotary embeddings that nothing stretches.
PLAIN_ROPE = Translation(_Rope.keys, _read_plain_rope, _write_plain_rope)

# Of YaRN: the key, Megatron-Core's field, and the value of both where it is not given.
_YARN = (
    ("factor", "rotary_scaling_factor", None),
    ("original_max_position_embeddings", "original_max_position_embeddings", None),
    ("beta_fast", "beta_fast", 32),
    ("beta_slow", "beta_slow", 1),
)


def _read_latent_rope(json: Json) -> Fields:
    rope = _Rope(json)
    fields: Fields = {"rotary_base": rope.theta, "rope_type": "yarn" if rope.kind == "yarn" else "rope"}
    if rope.kind == "yarn":
        for key, field, default in _YARN:
            value = rope.settings.pop(key, None) or default
            if value is None:
                raise refuse(f"{rope.key}: {key}", None, "must be given with yarn")
            fields[field] = value
        mscale, of_all = (rope.settings.pop(name, None) for name in ("mscale", "mscale_all_dim"))
        if bool(mscale) != bool(of_all):
            valid = "must come with a mscale_all_dim, or both be left out: else the two sides scale differently"
            raise refuse(f"{rope.key}: mscale", mscale, valid)
        fields |= {"mscale": float(mscale or 1.0), "mscale_all_dim": float(of_all or 0.0)}
    elif rope.kind != "default":
        raise refuse(rope.key, rope.kind, 'must be "default" or "yarn": Megatron-Core has no other here')
    rope.refuse_rest()
    return fields


# Megatron-Core's defaults (MLATransformerConfig), for models that were configured here.
_DEFAULT_ROPE: Fields = {
    "rope_type": "yarn",
    "rotary_scaling_factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
}


def latent_rope(config: ModelConfig) -> Fields:
    """How the rotary embedding of latent attention is made, fields that are not given included."""
    found = {
        name: default if (v := field_value(config, name)) is None else v for name, default in _DEFAULT_ROPE.items()
    }
    return found if found["rope_type"] == "yarn" else {"rope_type": found["rope_type"]}


def _write_latent_rope(config: ModelConfig) -> Fields:
    rope = latent_rope(config)
    if rope["rope_type"] != "yarn":
        return _write_plain_rope(config)
    scaling: Fields = {"type": "yarn", "rope_type": "yarn"} | {key: rope[field] for key, field, _ in _YARN}
    if rope["mscale_all_dim"]:
        scaling |= {"mscale": rope["mscale"], "mscale_all_dim": rope["mscale_all_dim"]}
    return {"rope_theta": float(config.rotary_base), "rope_scaling": scaling}


LATENT_ROPE = Translation(_Rope.keys, _read_latent_rope, _write_latent_rope)
