"""A ds_config is changed where the engine would refuse it, and nowhere else."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_tied.engine import ds_config
from megatron_tied.errors import ConfigError
from megatron_tied.patching.deepspeed_json import read_deepspeed
from megatron_tied.patching.json_text import scan_json

# Every key that the engine refuses, with a value that it refuses, where it belongs.
REFUSED = {
    **{(key,): harmless for key, (harmless, _) in ds_config._REFUSED.items()},
    **{("zero_optimization", key): harmless for key, (harmless, _) in ds_config._REFUSED_ZERO.items()},
    **{
        ("zero_optimization", key): harmless
        for key, (harmless, _) in ds_config._REFUSED_ZERO_WITH_EXPERT_GROUPS.items()
    },
    **{
        ("zero_optimization", "offload_optimizer", key): harmless
        for key, (harmless, _) in ds_config._REFUSED_OFFLOAD.items()
    },
}


def refused(harmless: object) -> object:
    if isinstance(harmless, bool):
        return not harmless
    return {"enabled": True} if harmless is None else 7 if isinstance(harmless, int) else "other"


def nested(path: tuple[str, ...], value: object) -> dict[str, object]:
    return {path[0]: value if len(path) == 1 else nested(path[1:], value)}


def problems(config: dict[str, object]) -> list[str]:
    zero = {"stage": 1, **config.get("zero_optimization", {})}
    found = ds_config.engine_problems({**config, "zero_optimization": zero}, precision="bf16", sharded=True)
    return [problem.field for problem in found]


@pytest.mark.parametrize("path", REFUSED, ids=".".join)
@pytest.mark.parametrize("indent", [None, 2])
def test_every_refusal_is_cured(path: tuple[str, ...], indent: int | None) -> None:
    config = {"train_batch_size": 8, **nested(path, refused(REFUSED[path])), "steps_per_print": 10}
    assert problems(config) == [f"deepspeed.{'.'.join(path)}"]
    file = read_deepspeed(json.dumps(config, indent=indent))
    after, _ = scan_json(file.changed)
    assert problems(after) == []
    assert (after["train_batch_size"], after["steps_per_print"]) == (8, 10)
    (reason,) = file.reasons
    assert reason.startswith(".".join(path))


def test_all_refusals_at_once() -> None:
    config: dict[str, object] = {"train_batch_size": 8, "zero_optimization": {"offload_optimizer": {}}}
    for path, harmless in REFUSED.items():
        section = config
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = refused(harmless)
    file = read_deepspeed(json.dumps(config, indent=4))
    assert problems(scan_json(file.changed)[0]) == []
    assert len(file.reasons) == len(REFUSED)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1, "compile": {"deep": 1}}', '{"a": 1}'),
        ('{"compile": {"deep": 1}, "a": 1}', '{ "a": 1}'),
        ('{"compile": {"deep": 1}}', "{}"),
        ('{"compile": {"deep": 1},}', "{}"),
        ('{\n  "a": 1,\n  "compile": 1,\n  "b": 2\n}', '{\n  "a": 1,\n  "b": 2\n}'),
        ('{"compile": 1, "pipeline": 1, "hybrid_engine": 1}', "{}"),
        ('{"pipeline": {"enabled" :  true, "x": 1}}', '{"pipeline": {"enabled" :  false, "x": 1}}'),
        ('{"zero_optimization": {"stage":0}, "bf16": {"enabled": true}}', None),
        ('{"zero_optimization": {"stage": 0}}', '{"zero_optimization": {"stage": 0}}'),
        ('{"zero_optimization": "auto"}', '{"zero_optimization": "auto"}'),
        (
            '{"bf16": {"enabled": "auto"}, "prescale_gradients": "auto"}',
            '{"bf16": {"enabled": "auto"}, "prescale_gradients": "auto"}',
        ),
    ],
)
def test_texts(text: str, expected: str | None) -> None:
    expected = text.replace('"stage":0', '"stage":1') if expected is None else expected
    assert read_deepspeed(text).changed == expected


def test_a_config_that_works_is_left_alone() -> None:
    text = '{"train_batch_size": 8, "zero_optimization": {"stage": 3, "contiguous_gradients": true}} // fine\n'
    file = read_deepspeed(text)
    assert (file.changed, file.reasons) == (text, [])


def test_a_stage_that_is_none_is_told() -> None:
    with pytest.raises(ConfigError, match=r"zero_optimization = 3: must be an object"):
        read_deepspeed('{"zero_optimization": 3}')


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@given(config=st.dictionaries(st.text(), JSON, max_size=4), indent=st.none() | st.just(2), ascii_only=st.booleans())
def test_a_scan_reads_what_json_reads(config: dict[str, object], indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(config, indent=indent, ensure_ascii=ascii_only)
    found, members = scan_json(text)
    assert found == config
    for member in members:
        value = config
        for key in member.path:
            value = value[key]
        assert json.loads(text[member.value_start : member.value_end]) == value
        assert json.JSONDecoder().raw_decode(text, member.start)[0] == member.path[-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "line 1 = '\"a\": 2}': must be there once"),
        ('{"a" 1}', "must be a colon"),
        ('{"a": 1 "b": 2}', 'must be "," or "}"'),
        ('{\n"a": 1.2.3}', "line 2 = '1.2.3}': must be a number"),
        ("{a: 1}", "must be a name or text in double quotes"),
        ('{"a": "b', "must be a JSON value|must be a name or text"),
        ('{"a": [1, 2', 'must be "," or "]"'),
        ("{} {}", "must be the end of the file"),
    ],
)
def test_what_is_no_json(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        scan_json(text)
    assert any(part in str(error.value) for part in message.split("|"))
