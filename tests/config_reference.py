"""Every key of a config file, as the code has it: its values, its default, and the docstring below it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_tied.training.config import RunConfig

_HEAD = """# Every key of a config

Made from the code by `python -m tests.documents`. A config is YAML with these sections; `section.key=value` behind a
command replaces a value. An unknown key, or a value that does not fit, is an error before anything is built.
"""
_DEEPSPEED = """## deepspeed

What a `ds_config.json` holds, or the path of one: keys of DeepSpeed. ZeRO stage 1 unless it says another. What the
config says elsewhere (batch sizes, precision, clipping, optimizer, scheduler) may be left out or must agree.
"""
_PASSED_ON = (
    "Other fields of Megatron-Core's `TransformerConfig` may stand here, too; those that another key sets, or that\n"
    "tied experts rule out, are refused with the reason.\n"
)

Schema = Mapping[str, Any]


def text() -> str:
    """Markdown: a table for each section, a row for each key."""
    schema = RunConfig.model_json_schema()
    sections = [_section(name, part, schema["$defs"]) for name, part in schema["properties"].items() if "$ref" in part]
    return "\n".join([_HEAD, *sections, _DEEPSPEED])


def _section(name: str, part: Schema, definitions: Schema) -> str:
    definition = _resolved(part, definitions)
    lines = [f"## {name}", "", *definition["description"].strip().splitlines(), ""]
    lines += [_PASSED_ON] if definition["additionalProperties"] else []
    lines += ["| key | values | default | |", "|---|---|---|---|", *_rows(definition, definitions)]
    return "\n".join(lines) + "\n"


def _rows(definition: Schema, definitions: Schema, before: str = "") -> Iterator[str]:
    required = definition.get("required", ())
    missing = "*by the preset, or here*" if "preset" in definition["properties"] else "*must be given*"
    for key, field in definition["properties"].items():
        default = missing if key in required else f"`{_default(field)}`"
        cells = (f"`{before}{key}`", _values(field, definitions), default, field.get("description", ""))
        yield "| " + " | ".join(" ".join(cell.replace("|", r"\|").split()) for cell in cells) + " |"
        for option in _options(field):
            if "$ref" in option:
                yield from _rows(_resolved(option, definitions), definitions, f"{before}{key}.")


def _default(field: Schema) -> str:
    value = field.get("default", "derived")
    return value if isinstance(value, str) else "{}" if isinstance(value, dict) else json.dumps(value)


def _values(field: Schema, definitions: Schema) -> str:
    return " or ".join(dict.fromkeys(_kind(option) for option in _options(field)))


def _options(field: Schema) -> list[Schema]:
    return list(field.get("anyOf", [field]))


def _kind(option: Schema) -> str:
    """What one kind of value is, in words: `{"type": "integer", "minimum": 1}` is "integer >= 1"."""
    if "$ref" in option:
        return "mapping of the keys below"
    if "enum" in option or "const" in option:
        return ", ".join(f"`{value}`" for value in option.get("enum", [option.get("const")]))
    if option["type"] == "array":
        parts = option.get("prefixItems") or [option["items"]]
        inside = ", ".join(" or ".join(_kind(kind) for kind in _options(part)) for part in parts)
        return f"[{inside}{'' if 'prefixItems' in option else ', ...'}]"
    words = {"string": "text", "null": "null", "boolean": "true, false", "object": "mapping"}
    word = words.get(option["type"], option["type"])
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    return " ".join([word, *(f"{sign} {option[bound]}" for bound, sign in bounds.items() if bound in option)])


def _resolved(part: Schema, definitions: Schema) -> Schema:
    return definitions[part["$ref"].rpartition("/")[2]] if "$ref" in part else part
