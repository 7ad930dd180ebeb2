"""What the `deepspeed` section may say, and the ds_config that the engine gets.

Batch sizes, clipping and precision belong to the run config; a ds_config may repeat them or write "auto".
What would untie, mix or mis-scale experts, or has no effect here, is refused with its reason. Facts about
DeepSpeed are those of 0.19.8.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Set
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.installed import class_fields

# Key -> (the value that changes nothing, why any other is refused).
Refusals = Mapping[str, tuple[object, str]]

_NO_EFFECT_ON_DATA = "has no effect: data is read by Megatron-Core's datasets, see the data section"
_ONE_SCALE = "would scale expert and other gradients differently"
_MIXES_EXPERTS = "with expert or tensor parallelism: DeepSpeed would reduce experts over the wrong ranks"
_NO_EXPERT_GROUPS = "with expert or tensor parallelism: ZeRO++ knows no expert groups"

# What no engine of ours can do with.
_REFUSED: Refusals = {
    "bfloat16": (None, 'is an old name: write "bf16"'),
    "compile": (None, "rewrites the backward pass: a tied bank would be reduced before its last use"),
    "expert_parallel": (
        None,
        "unties silently: AutoEP copies the bank into every layer; use parallel.expert_model_parallel_size",
    ),
    "gradient_allreduce_op": ("mean", f'must be "mean": another {_ONE_SCALE}'),
    "gradient_predivide_factor": (1, f"must be 1: another {_ONE_SCALE}"),
    "hybrid_engine": (None, "replaces layers for generation and knows no tied experts"),
    "pipeline": (None, "has no effect: the model is not a DeepSpeed PipelineModule"),
    "prescale_gradients": (False, f"must be false: true {_ONE_SCALE}"),
    "sequence_parallel_size": (1, "must be 1: DeepSpeed's sequence parallelism is not supported"),
    "tensor_parallel": (None, "shards layers by name and knows no expert bank"),
    "use_data_before_expert_parallelism": (False, "must be false: Megatron-Core orders its ranks otherwise"),
    "weight_quantization": (None, "has no effect: it is for inference"),
}

# What the run config says, or what has no effect on a run.
_REFUSED_IN_RUNS: Refusals = {
    "activation_checkpointing": (None, "has no effect: use model.recompute_granularity"),
    "data_efficiency": (None, _NO_EFFECT_ON_DATA),
    "dataloader_drop_last": (False, _NO_EFFECT_ON_DATA),
    "managed_gradient_accumulation": (True, "must be true: the training loop relies on it"),
    "optimizer": (None, "belongs to the run config: see optimizer.name, optimizer.lr and its neighbours"),
    "scheduler": (None, "belongs to the run config: see optimizer.warmup_steps and optimizer.min_lr"),
    "torch_autocast": (None, "belongs to the run config: see train.precision"),
}

_REFUSED_ZERO: Refusals = {
    "compute_grad_norm": (True, "must be true: clipping and metrics need the gradient norm"),
    "leaf_module": (None, "must be left out: gradients of a tied bank in a leaf module can be lost"),
    "round_robin_gradients": (False, "must be false: DeepSpeed's record of which rank holds what is wrong with it"),
    "zenflow": (None, "must be left out: it updates parameters out of step and knows no expert groups"),
}

_REFUSED_OFFLOAD: Refusals = {
    "super_offload": (False, "must be false: its optimizer states are out of reach of checkpoints"),
}

_REFUSED_ZERO_WITH_EXPERT_GROUPS: Refusals = {
    "contiguous_gradients": (True, f"must be true {_MIXES_EXPERTS}"),
    "reduce_scatter": (True, f"must be true {_MIXES_EXPERTS}"),
    "zero_hpz_partition_size": (1, f"must be 1 {_NO_EXPERT_GROUPS}"),
    "zero_quantized_gradients": (False, f"must be false {_NO_EXPERT_GROUPS}"),
    "zero_quantized_weights": (False, f"must be false {_NO_EXPERT_GROUPS}"),
}

# DeepSpeed itself ignores unknown top-level keys. Those that it reads:
_TOP_LEVEL_KEYS = {
    *_REFUSED,
    *_REFUSED_IN_RUNS,
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("gradient_clipping", "bf16", "fp16", "data_types"),
    *("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "aio"),
    *("communication_data_type", "seq_parallel_communication_data_type", "disable_allgather"),
    *("checkpoint", "datastates_ckpt", "autotuning", "vocabulary_size", "disable_python_gc"),
    *("tensorboard", "wandb", "csv_monitor", "comet", "steps_per_print", "log_level", "dump_state"),
    *("flops_profiler", "comms_logger", "timers", "wall_clock_breakdown", "memory_breakdown"),
}


class RunValues(TypedDict):
    """What the run config says and a ds_config could say too. Batch sizes in sequences."""

    micro_batch_size: int
    global_batch_size: int
    gradient_accumulation_steps: int
    clip_grad: float
    precision: Literal["fp32", "bf16", "fp16"]
    expert_parallel_size: int
    tensor_parallel_size: int


class _Stated(NamedTuple):
    """A value that the run config fixes: where a ds_config would say it, and what it follows from."""

    path: tuple[str, ...]
    value: object
    source: str


def build_deepspeed_config(user: Mapping[str, Any], **run: Unpack[RunValues]) -> dict[str, Any]:
    """The complete ds_config: the user's section, the run's values, and ZeRO stage 1 unless another is given.

    Where the user writes "auto" the run's value is used, and DeepSpeed's default where the run has none.
    Raises ConfigError for everything in `deepspeed_problems`.
    """
    if problems := deepspeed_problems(user, **run):
        raise ConfigError(problems)
    config = without_auto(user)
    for path, value, _ in _stated_by_run(**run):
        _section(config, path)[path[-1]] = value
    config.setdefault("zero_optimization", {}).setdefault("stage", 1)
    if run["precision"] == "bf16":
        # Without it DeepSpeed would take a step with a gradient norm that is not finite, at stages 1 and 2.
        config["bf16"].setdefault("check_grad_overflow", True)
    # The optimizer is ours. DeepSpeed asks for these two before it takes one that it did not make.
    config.setdefault("zero_allow_untested_optimizer", True)
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    return config


def deepspeed_problems(user: Mapping[str, Any], **run: Unpack[RunValues]) -> list[Problem]:
    """Everything in a ds_config that DeepSpeed does not know, contradicts `run`, or breaks tying."""
    stated = without_auto(user)
    sections = {key: stated.get(key, {}) for key in ("zero_optimization", "bf16", "fp16")}
    wrong = [key for key, section in sections.items() if not isinstance(section, Mapping)]
    if wrong:
        return [Problem(f"deepspeed.{key}", stated[key], "must be a mapping of keys") for key in wrong]
    return [
        *_unknown(user, _TOP_LEVEL_KEYS, "deepspeed"),
        *_unknown(sections["zero_optimization"], _zero_keys(), "deepspeed.zero_optimization"),
        *refused_keys(stated, _REFUSED_IN_RUNS, "deepspeed"),
        *_contradictions(stated, run),
        *engine_problems(
            {**stated, "zero_optimization": {"stage": 1, **sections["zero_optimization"]}},
            precision=run["precision"],
            sharded=max(run["expert_parallel_size"], run["tensor_parallel_size"]) > 1,
        ),
    ]


def values_for_run_config(user: Mapping[str, Any]) -> dict[str, Any]:
    """What a ds_config says for the run config, by the run config's key: `{"train.global_batch_size": 32}`.

    It holds where the run config is silent, so that an existing ds_config.json need not be repeated.
    """
    names = {
        "train_batch_size": "train.global_batch_size",
        "train_micro_batch_size_per_gpu": "train.micro_batch_size",
        "gradient_clipping": "optimizer.clip_grad",
    }
    values = {ours: user[theirs] for theirs, ours in names.items() if user.get(theirs, "auto") != "auto"}
    for precision in ("fp16", "bf16"):
        if _lookup(user, (precision, "enabled")) is True:
            values["train.precision"] = precision
    return values


def _stated_by_run(**run: Unpack[RunValues]) -> Iterator[_Stated]:
    batch = f"train.global_batch_size = {run['global_batch_size']}"
    micro = f"train.micro_batch_size = {run['micro_batch_size']}"
    accumulation = run["gradient_accumulation_steps"]
    precision = f"train.precision = {run['precision']!r}"
    yield _Stated(("train_batch_size",), run["global_batch_size"], batch)
    yield _Stated(("train_micro_batch_size_per_gpu",), run["micro_batch_size"], micro)
    yield _Stated(("gradient_accumulation_steps",), accumulation, f"{batch} with {micro}")
    # DeepSpeed clips at 1.0 when the key is missing.
    yield _Stated(("gradient_clipping",), run["clip_grad"], f"optimizer.clip_grad = {run['clip_grad']}")
    yield _Stated(("bf16", "enabled"), run["precision"] == "bf16", precision)
    yield _Stated(("fp16", "enabled"), run["precision"] == "fp16", precision)


def _contradictions(user: Mapping[str, Any], run: RunValues) -> Iterator[Problem]:
    for path, value, source in _stated_by_run(**run):
        said = _lookup(user, path)
        if said is not None and said != value:
            valid = f'contradicts {source}: leave it out, or write "auto" or {json.dumps(value)}'
            yield Problem(".".join(("deepspeed", *path)), said, valid)


def engine_problems(ds_config: Mapping[str, Any], *, precision: str, sharded: bool) -> Iterator[Problem]:
    """What in a ds_config without "auto" would untie experts, lose, mix or mis-scale gradients, or is no stage.

    `sharded`: whether ranks hold different experts or parts of matrices (expert or tensor parallelism).
    """
    yield from refused_keys(ds_config, _REFUSED, "deepspeed")
    zero = ds_config.get("zero_optimization", {})
    field = "deepspeed.zero_optimization"
    yield from refused_keys(zero, _REFUSED_ZERO, field)
    offload = zero.get("offload_optimizer")
    if isinstance(offload, Mapping):
        yield from refused_keys(offload, _REFUSED_OFFLOAD, f"{field}.offload_optimizer")
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        yield Problem(f"{field}.stage", stage, "must be 0, 1, 2 or 3")
    elif isinstance(stage, int):
        yield from _idle_offloads(zero, stage)
    if sharded:
        yield from refused_keys(zero, _REFUSED_ZERO_WITH_EXPERT_GROUPS, field)
    if stage == 0 and precision != "fp32":
        valid = (
            f"must be 1, 2 or 3 with {precision}: stage 0 is supported in fp32 only, DeepSpeed's half-precision "
            "optimizer for it leaves expert parallel gradients out of the norm it clips by"
        )
        yield Problem(f"{field}.stage", stage, valid)


def _idle_offloads(zero: Mapping[str, Any], stage: int) -> Iterator[Problem]:
    """Offloads that DeepSpeed passes over at this stage."""
    for key, least in (("offload_optimizer", 1), ("offload_param", 3)):
        section = zero.get(key)
        device = section.get("device") if isinstance(section, Mapping) else None
        if stage < least and device not in (None, "none"):
            field = f"deepspeed.zero_optimization.{key}.device"
            yield Problem(field, device, f"has no effect at ZeRO stage {stage}: needs stage {least} or higher")


def _zero_keys() -> Set[str]:
    return class_fields("DeepSpeedZeroConfig", "deepspeed.runtime.zero.config").keys()


def _unknown(section: Mapping[str, Any], known: Set[str], field: str) -> Iterator[Problem]:
    for key in sorted(section.keys() - known):
        nearest = get_close_matches(key, known, n=1)
        hint = f"; did you mean '{field}.{nearest[0]}'?" if nearest else ""
        yield Problem(f"{field}.{key}", section[key], f"is no DeepSpeed key{hint}")


def refused_keys(section: Mapping[str, Any], refusals: Refusals, field: str) -> Iterator[Problem]:
    """A problem for each key of `section` in `refusals`, unless its value is the harmless one."""
    for key, (harmless, reason) in refusals.items():
        value = section.get(key, harmless)
        if value == harmless or (isinstance(value, Mapping) and value.get("enabled") is False):
            continue
        yield Problem(f"{field}.{key}", value, reason)


def without_auto(section: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without the keys whose value is "auto"."""
    return {
        key: without_auto(value) if isinstance(value, Mapping) else value
        for key, value in section.items()
        if value != "auto"
    }


def _section(config: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for key in path[:-1]:
        config = config.setdefault(key, {})
    return config


def _lookup(config: Mapping[str, Any], path: tuple[str, ...]) -> object:
    value: object = config
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
