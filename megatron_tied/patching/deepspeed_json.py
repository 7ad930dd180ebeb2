"""A ds_config: the keys that would untie experts, or mix and mis-scale their gradients, set to what works."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_tied.engine.ds_config import engine_problems, without_auto
from megatron_tied.errors import ConfigError, Problem
from megatron_tied.patching.edits import Edit, apply_edits
from megatron_tied.patching.json_text import Member, scan_json

# What works, as JSON, where another value is refused; a section that is not here is switched off or taken out.
_WORKS = {
    "gradient_allreduce_op": '"mean"',
    "gradient_predivide_factor": "1.0",
    "prescale_gradients": "false",
    "sequence_parallel_size": "1",
    "use_data_before_expert_parallelism": "false",
    "zero_optimization.compute_grad_norm": "true",
    "zero_optimization.round_robin_gradients": "false",
    "zero_optimization.contiguous_gradients": "true",
    "zero_optimization.reduce_scatter": "true",
    "zero_optimization.zero_hpz_partition_size": "1",
    "zero_optimization.zero_quantized_gradients": "false",
    "zero_optimization.zero_quantized_weights": "false",
    "zero_optimization.offload_optimizer.super_offload": "false",
    "zero_optimization.stage": "1",
}
_RENAMED = {"bfloat16": "bf16"}


@dataclass(frozen=True)
class DeepSpeedFile:
    """The text of a ds_config that works with tied experts, why each change is made, and what is left to the user."""

    changed: str
    reasons: Sequence[str]
    warnings: Sequence[Problem]


def read_deepspeed(text: str) -> DeepSpeedFile:
    """What is to be changed in a ds_config. Raises ConfigError if it is no JSON, or cannot be changed safely."""
    changed = text
    reasons: list[str] = []
    touched: set[tuple[str, ...]] = set()
    # One at a time: a change moves what stands behind it, and may be the neighbour of the next.
    while problem := next(_problems(scan_json(changed)[0]), None):
        path = tuple(problem.field.removeprefix("deepspeed.").split("."))
        if path in touched:
            raise ConfigError(problem)
        touched.add(path)
        edit, now = _change(changed, path)
        changed = apply_edits(changed, [edit])
        reasons.append(f"{'.'.join(path)} = {problem.value!r}: {problem.valid}; {now}")
    _prove(text, changed, touched)
    return DeepSpeedFile(changed, reasons, list(_warnings(scan_json(text)[0])))


def is_ds_config(config: Mapping[str, Any]) -> bool:
    """Whether an object has a key that only a ds_config has."""
    known = ("zero_optimization", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return any(key in config for key in known)


def _warnings(config: Mapping[str, Any]) -> Iterator[Problem]:
    stage = without_auto(config).get("zero_optimization", {}).get("stage", 0)
    if "activation_checkpointing" in config and stage != 0:
        valid = (
            f"with ZeRO {stage} reentrant recompute loses gradients of tied experts outside of this project's engine: "
            "use model.recompute_granularity of the run config"
        )
        yield Problem("activation_checkpointing", "in this file", valid)


def _problems(config: Mapping[str, Any]) -> Iterator[Problem]:
    stated = without_auto(config)
    zero = stated.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise ConfigError(Problem("deepspeed.zero_optimization", zero, "must be an object"))
    precision = next((name for name in ("bf16", "fp16") if _is_on(stated, name)), "fp32")
    if _is_on(stated, "bfloat16"):
        precision = "bf16"
    # A file without a stage gets 1 from this project's engine.
    filled = {**stated, "zero_optimization": {"stage": 1, **zero}}
    yield from engine_problems(filled, precision=precision, sharded=True)


def _is_on(config: Mapping[str, Any], name: str) -> bool:
    section = config.get(name)
    return isinstance(section, Mapping) and section.get("enabled") is True


def _change(text: str, path: tuple[str, ...]) -> tuple[Edit, str]:
    config, members = scan_json(text)
    by_path = {member.path: member for member in members}
    if path not in by_path:
        raise ConfigError(Problem(".".join(path), None, "is asked for by the engine: add it by hand"))
    member, name = by_path[path], ".".join(path)
    if name in _RENAMED and _RENAMED[name] not in config:
        end = text.index('"', member.start + 1) + 1
        return Edit(member.start, end, f'"{_RENAMED[name]}"'), f'renamed to "{_RENAMED[name]}"'
    if name in _WORKS:
        return Edit(member.value_start, member.value_end, _WORKS[name]), f"set to {_WORKS[name]}"
    if switch := by_path.get((*path, "enabled")):
        return Edit(switch.value_start, switch.value_end, "false"), "switched off"
    return _taken_out(text, member), "taken out"


def _taken_out(text: str, member: Member) -> Edit:
    """The member with the comma that parts it from its neighbours, and its line where it has one of its own."""
    start, end = member.start, member.value_end
    while start and text[start - 1] in " \t\r\n":
        start -= 1
    following = end
    while following < len(text) and text[following] in " \t\r\n":
        following += 1
    if text[following] == ",":
        return Edit(start, following + 1, "")
    return Edit(start - 1 if text[start - 1] == "," else start, end, "")


def _prove(text: str, changed: str, touched: set[tuple[str, ...]]) -> None:
    """Raise ConfigError unless every member that no change is about stands in the result as it was."""
    before, after = ({member.path: member for member in scan_json(one)[1]} for one in (text, changed))
    about = {*touched, *((new,) for old, new in _RENAMED.items() if (old,) in touched)}
    for path, member in before.items():
        if any(path[: len(one)] == one or one[: len(path)] == path for one in about):
            continue
        if path not in after or _value(text, member) != _value(changed, after[path]):
            raise ConfigError(
                Problem(".".join(path), _value(text, member), "stands where nothing can be changed safely")
            )


def _value(text: str, member: Member) -> str:
    return text[member.value_start : member.value_end]
