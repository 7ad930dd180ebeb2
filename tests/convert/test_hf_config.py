"""Keys of config.json: their types, and that what is left out is what transformers takes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_tied.convert.architectures import ARCHITECTURES
from megatron_tied.convert.hf_source import HuggingFaceSource
from megatron_tied.errors import ConfigError
from tests.convert.hf_models import VOCABULARY, load, logits, save, some_tokens

# Of one type each that JSON has; which of them are right depends on the key.
WRONG = ["six", None, -1, 0, 1.5, True, [1], {"a": 1}, math.nan, 10**30]
MODELS = ("olmoe", "qwen3_moe", "deepseek_v2", "deepseek_v3")


def config_of(name: str) -> dict[str, Any]:
    own = transformers.CONFIG_MAPPING[name]().to_dict()
    keys = ARCHITECTURES[name].schema.model_fields
    return {key: value for key, value in own.items() if key in keys} | {"num_experts_per_tok": 8, "model_type": name}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_left_out_is_what_the_class_takes(name: str) -> None:
    config = transformers.CONFIG_MAPPING[name]()
    fields = ARCHITECTURES[name].schema.model_fields
    for key, field in fields.items():
        if field.is_required() or key.startswith("rope_"):
            continue
        theirs = getattr(config, key, None)
        # Derived by the class from others.
        if key not in ("num_key_value_heads", "head_dim", "mlp_only_layers") or field.default is not None:
            assert field.default == theirs, key
    assert config.rope_parameters == {"rope_theta": 10_000.0, "rope_type": "default"}


@pytest.mark.parametrize("name", MODELS)
def test_every_key_is_of_some_translation(name: str) -> None:
    architecture = ARCHITECTURES[name]
    known = {key for translation in architecture.translations for key in translation.keys}
    assert architecture.schema.model_fields.keys() <= known


@pytest.mark.parametrize("name", MODELS)
def test_whatever_a_key_holds_it_is_read_or_refused_by_name(name: str) -> None:
    architecture = ARCHITECTURES[name]
    keys = [*architecture.schema.model_fields, *architecture.schema.renamed]
    keys += sorted({key for translation in architecture.translations for key in translation.keys} - set(keys))
    rope = ("factor", "rope_theta", "rope_type", "mscale", "beta_fast", "original_max_position_embeddings")
    whole = config_of(name)
    told: list[str] = []
    for key in keys:
        for value in [*WRONG, *({part: wrong} for part in rope for wrong in WRONG if key.startswith("rope_"))]:
            json = {usual: held for usual, held in whole.items() if architecture.schema.renamed.get(key) != usual}
            try:
                architecture.read(json | {key: value})
            except ConfigError as error:
                told += [problem.field for problem in error.problems]
        if key != "num_experts_per_tok":
            architecture.read({other: held for other, held in whole.items() if other != key})
    assert all(field.startswith(("config.json: ", "model.")) for field in told)


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("olmoe", "hidden_size", "six", "must be a valid integer"),
        ("olmoe", "num_hidden_layers", 10**30, "must be less than or equal to 1000"),
        ("olmoe", "num_attention_heads", True, "must be a valid integer"),
        ("olmoe", "norm_topk_prob", "six", "must be a valid boolean"),
        ("olmoe", "rope_theta", math.nan, "must be a finite number"),
        ("olmoe", "rope_scaling", 0, "must be a valid dictionary"),
        ("olmoe", "num_local_experts", 4, "must be num_experts, which is 64"),
        ("olmoe", "eos_token_id", [5, "x"], "must be a valid integer"),
        ("olmoe", "pad_token_id", 60_000, "must be below vocab_size, 50304"),
        ("qwen3_moe", "mlp_only_layers", "six", "must be a valid list"),
        ("qwen3_moe", "decoder_sparse_step", 0, "must be greater than 0"),
        ("deepseek_v2", "topk_method", "noaux_tc", "must be 'greedy' or 'group_limited_greedy'"),
        ("deepseek_v3", "routed_scaling_factor", math.inf, "must be a finite number"),
        ("deepseek_v3", "n_group", 1.5, "must be a valid integer"),
    ],
)
def test_messages(name: str, key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ARCHITECTURES[name].read(config_of(name) | {key: value})
    (problem,) = caught.value.problems
    assert problem.field == f"config.json: {key}"
    assert problem.valid == message


def test_a_key_within_rope_parameters_is_named() -> None:
    json = config_of("deepseek_v3") | {"rope_parameters": {"rope_type": "yarn", "factor": "4"}}
    with pytest.raises(ConfigError, match=r"config.json: rope_parameters: factor = '4': must be a valid number"):
        ARCHITECTURES["deepseek_v3"].read(json)


def test_a_model_whose_config_leaves_out_defaults_is_the_one_that_transformers_makes(tmp_path: Path) -> None:
    directory = save("deepseek_v3", tmp_path / "model", routed_scaling_factor=2.5)
    expected = logits(load(directory), some_tokens())
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for key in ("routed_scaling_factor", "norm_topk_prob", "rms_norm_eps", "initializer_range"):
        config.pop(key)
    path.write_text(json.dumps(config))
    torch.testing.assert_close(logits(load(directory), some_tokens()), expected)
    assert HuggingFaceSource(directory).config.model_extra["moe_router_topk_scaling_factor"] == 2.5
    assert HuggingFaceSource(directory).config.vocab_size == VOCABULARY
