"""What a ds_config may say, what it gets, and why the rest is refused."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megatron_tied.engine import ds_config
from megatron_tied.engine.ds_config import build_deepspeed_config, deepspeed_problems, values_for_run_config
from megatron_tied.errors import ConfigError
from megatron_tied.installed import class_fields

RUN = {
    "micro_batch_size": 2,
    "global_batch_size": 16,
    "gradient_accumulation_steps": 4,
    "clip_grad": 0.0,
    "precision": "fp32",
    "expert_parallel_size": 1,
    "tensor_parallel_size": 1,
}


def told(user: dict[str, Any], **run: Any) -> list[str]:
    return [str(problem) for problem in deepspeed_problems(user, **(RUN | run))]


def test_an_empty_section_gets_everything_of_the_run():
    assert build_deepspeed_config({}, **RUN) == {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.0,  # stated: DeepSpeed clips at 1.0 otherwise
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision_turns_one_section_on(precision: str):
    config = build_deepspeed_config({}, **(RUN | {"precision": precision}))
    assert {name: config[name]["enabled"] for name in ("bf16", "fp16")} == {
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
    }


def test_the_users_own_values_stay_and_are_not_changed_in_place():
    user = {
        "fp16": {"loss_scale": 128, "enabled": "auto"},
        "zero_optimization": {"reduce_bucket_size": "auto", "offload_optimizer": {"device": "cpu"}},
        "steps_per_print": 5,
        "zero_force_ds_cpu_optimizer": True,
        "train_batch_size": 16,
        "gradient_accumulation_steps": "auto",
    }
    config = build_deepspeed_config(user, **(RUN | {"precision": "fp16"}))
    assert config["fp16"] == {"loss_scale": 128, "enabled": True}
    assert config["zero_optimization"] == {"offload_optimizer": {"device": "cpu"}, "stage": 1}
    assert (config["steps_per_print"], config["zero_force_ds_cpu_optimizer"]) == (5, True)
    assert config["gradient_accumulation_steps"] == 4
    assert user["fp16"] == {"loss_scale": 128, "enabled": "auto"}
    assert "stage" not in user["zero_optimization"]


@pytest.mark.parametrize(
    ("user", "line"),
    [
        (
            {"train_batch_size": 8},
            "deepspeed.train_batch_size = 8: contradicts train.global_batch_size = 16: "
            'leave it out, or write "auto" or 16',
        ),
        (
            {"train_micro_batch_size_per_gpu": 1},
            "deepspeed.train_micro_batch_size_per_gpu = 1: contradicts train.micro_batch_size = 2",
        ),
        (
            {"gradient_accumulation_steps": 2},
            "deepspeed.gradient_accumulation_steps = 2: contradicts train.global_batch_size = 16 with "
            'train.micro_batch_size = 2: leave it out, or write "auto" or 4',
        ),
        ({"gradient_clipping": 1}, "deepspeed.gradient_clipping = 1: contradicts optimizer.clip_grad = 0.0"),
        (
            {"bf16": {"enabled": True}},
            "deepspeed.bf16.enabled = True: contradicts train.precision = 'fp32': "
            'leave it out, or write "auto" or false',
        ),
        ({"fp16": {"enabled": True}}, "deepspeed.fp16.enabled = True: contradicts train.precision = 'fp32'"),
    ],
)
def test_a_contradiction_names_both(user: dict[str, Any], line: str):
    (only,) = told(user)
    assert only.startswith(line)


@pytest.mark.parametrize(
    ("user", "line"),
    [
        (
            {"wal_clock_breakdown": 1},
            "deepspeed.wal_clock_breakdown = 1: is no DeepSpeed key; did you mean 'deepspeed.wall_clock_breakdown'?",
        ),
        ({"elasticity": {}}, "deepspeed.elasticity = {}: is no DeepSpeed key"),
        (
            {"zero_optimization": {"stages": 2}},
            "deepspeed.zero_optimization.stages = 2: is no DeepSpeed key; "
            "did you mean 'deepspeed.zero_optimization.stage'?",
        ),
        ({"zero_optimization": True}, "deepspeed.zero_optimization = True: must be a mapping of keys"),
        ({"bf16": True}, "deepspeed.bf16 = True: must be a mapping of keys"),
        ({"zero_optimization": {"stage": 4}}, "deepspeed.zero_optimization.stage = 4: must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": True}}, "deepspeed.zero_optimization.stage = True: must be 0, 1"),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}},
            "deepspeed.optimizer = {'type': 'AdamW', 'params': {}}: belongs to the run config",
        ),
        ({"scheduler": {"type": "X"}}, "deepspeed.scheduler = {'type': 'X'}: belongs to the run config"),
        ({"expert_parallel": {"enabled": True}}, "deepspeed.expert_parallel = {'enabled': True}: unties"),
        ({"tensor_parallel": {"autotp_size": 2}}, "deepspeed.tensor_parallel = {'autotp_size': 2}: shards"),
        ({"activation_checkpointing": {"x": 1}}, "deepspeed.activation_checkpointing = {'x': 1}: has no"),
        ({"gradient_allreduce_op": "sum"}, "deepspeed.gradient_allreduce_op = 'sum': must be \"mean\""),
        (
            {"zero_optimization": {"round_robin_gradients": True}},
            "deepspeed.zero_optimization.round_robin_gradients = True: must be false",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu", "super_offload": True}}},
            "deepspeed.zero_optimization.offload_optimizer.super_offload = True: must be false",
        ),
        (
            {"zero_optimization": {"leaf_module": {"classes": ["X"]}}},
            "deepspeed.zero_optimization.leaf_module = {'classes': ['X']}: must be left out",
        ),
    ],
)
def test_what_is_refused_at_any_expert_parallelism(user: dict[str, Any], line: str):
    for size in (1, 2):
        (only,) = told(user, expert_parallel_size=size)
        assert only.startswith(line)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("contiguous_gradients", False),
        ("reduce_scatter", False),
        ("zero_hpz_partition_size", 2),
        ("zero_quantized_gradients", True),
        ("zero_quantized_weights", True),
    ],
)
@pytest.mark.parametrize("parallelism", ["expert_parallel_size", "tensor_parallel_size"])
def test_what_is_refused_only_where_experts_have_groups_of_their_own(parallelism: str, key: str, value: object):
    user = {"zero_optimization": {key: value}}
    assert told(user) == []
    (only,) = told(user, **{parallelism: 2})
    assert only.startswith(f"deepspeed.zero_optimization.{key} = {value}: must be ")
    assert "with expert or tensor parallelism" in only


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("size", [1, 2])
def test_stage_0_is_refused_in_half_precision(precision, size):
    (only,) = told({"zero_optimization": {"stage": 0}}, precision=precision, expert_parallel_size=size)
    assert only.startswith(f"deepspeed.zero_optimization.stage = 0: must be 1, 2 or 3 with {precision}")


def test_stage_0_is_allowed_in_fp32():
    assert told({"zero_optimization": {"stage": 0}}, precision="fp32", expert_parallel_size=2) == []


def test_disabled_sections_and_harmless_values_are_let_through():
    user = {
        "hybrid_engine": {"enabled": False},
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "zero_optimization": {"contiguous_gradients": True, "zero_hpz_partition_size": 1},
    }
    assert told(user, expert_parallel_size=2) == []


def test_build_raises_every_problem():
    with pytest.raises(ConfigError) as caught:
        build_deepspeed_config({"train_batch_size": 1, "scheduler": {"type": "x"}}, **RUN)
    assert [problem.field for problem in caught.value.problems] == [
        "deepspeed.scheduler",
        "deepspeed.train_batch_size",
    ]


def test_values_for_the_run_config():
    user = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": 0,
        "bf16": {"enabled": True},
    }
    assert values_for_run_config(user) == {
        "train.global_batch_size": 64,
        "optimizer.clip_grad": 0,
        "train.precision": "bf16",
    }
    assert values_for_run_config({"bf16": {"enabled": False}, "fp16": True}) == {}


# Against the installed DeepSpeed


def test_every_key_is_one_that_deepspeed_reads():
    sources = Path(find_spec("deepspeed").submodule_search_locations[0])
    files = [*sources.glob("*.py"), *sources.glob("*/*.py"), *sources.glob("runtime/**/*.py")]
    literals = {word for file in files for word in re.findall(r"""["'](\w+)["']""", file.read_text())}
    assert ds_config._TOP_LEVEL_KEYS - literals == set()


def test_zero_keys_are_those_of_the_installed_deepspeed():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    expected = fields.keys() | {field.alias for field in fields.values() if field.alias}
    assert class_fields("DeepSpeedZeroConfig", "deepspeed.runtime.zero.config").keys() == expected
    refused = ds_config._REFUSED_ZERO.keys() | ds_config._REFUSED_ZERO_WITH_EXPERT_GROUPS.keys()
    assert refused - expected == set()


def test_deepspeed_accepts_the_result():
    from deepspeed.runtime.config import DeepSpeedConfig

    run = RUN | {"global_batch_size": 8, "clip_grad": 0.5}
    config = DeepSpeedConfig(build_deepspeed_config({"zero_optimization": {"overlap_comm": True}}, **run))
    assert (config.train_batch_size, config.gradient_accumulation_steps) == (8, 4)
    assert (config.gradient_clipping, config.zero_optimization_stage) == (0.5, 1)
    assert config.zero_allow_untested_optimizer
    assert not config.zero_force_ds_cpu_optimizer
    assert config.steps_per_print is None  # quiet


@pytest.mark.parametrize(
    ("stage", "key", "least"), [(0, "offload_optimizer", 1), (1, "offload_param", 3), (2, "offload_param", 3)]
)
def test_an_offload_that_deepspeed_passes_over(stage: int, key: str, least: int) -> None:
    zero = {"stage": stage, key: {"device": "cpu"}}
    (problem,) = deepspeed_problems({"zero_optimization": zero}, **RUN)
    told = f"{key}.device = 'cpu': has no effect at ZeRO stage {stage}: needs stage {least} or higher"
    assert str(problem) == f"deepspeed.zero_optimization.{told}"
    for harmless in ({**zero, "stage": least}, {**zero, key: {"device": "none"}}, {**zero, key: None}):
        assert deepspeed_problems({"zero_optimization": harmless}, **RUN) == []
