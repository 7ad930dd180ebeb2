"""Config files: YAML with `section.field=value` overrides to a RunConfig, and back.

The file is read as plain values: no interpolation, nothing from the environment. Paths in it, that of a
ds_config.json included, are relative to the working directory.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from megatron_tied.engine.ds_config import values_for_run_config
from megatron_tied.errors import ConfigError, Problem
from megatron_tied.files import write_whole
from megatron_tied.models.config import ModelConfig
from megatron_tied.monitor.alerts import AlertSettings
from megatron_tied.topology import TieConfig
from megatron_tied.training.config import RunConfig, transformer_fields
from megatron_tied.training.fields import Section
from megatron_tied.training.optimizer_config import with_preset
from megatron_tied.training.sections import WandbConfig
from megatron_tied.training.validation import problems_of, to_json


def load_config(
    path: str | os.PathLike[str] | None,
    overrides: Sequence[str] = (),
    sections: Mapping[str, Mapping[str, Any]] | None = None,
) -> RunConfig:
    """Reads a config file; each override, such as `tie.banks=[0,1,1,2]`, replaces a value, in order.

    `sections` take the place of the file's (path None: there is no file). Raises ConfigError with every problem of
    form; `RunConfig.problems` finds those of content.
    """
    config = OmegaConf.create({}) if path is None else _with_deepspeed_file(_read_yaml(Path(path)))
    for name, section in (sections or {}).items():
        config[name] = dict(section)
    for override in overrides:
        config = _with_deepspeed_file(_override(config, override))
    values = _plain(config)
    if problems := list(_interpolations(values)):
        raise ConfigError(problems)
    return parse_config(values)


def parse_config(values: Mapping[str, Any]) -> RunConfig:
    """A RunConfig from plain values, as YAML gives them. Raises ConfigError."""
    # A section without keys reads as null, and one that is not there lacks its required keys.
    given = {**values, **{name: values.get(name) for name in RunConfig.model_fields}}
    given = {name: {} if section is None else section for name, section in given.items()}
    if isinstance(given["deepspeed"], Mapping):
        for field, value in values_for_run_config(given["deepspeed"]).items():
            section, key = field.split(".")
            if isinstance(given[section], Mapping):
                given[section] = {key: value} | given[section]
    if isinstance(given["optimizer"], Mapping):
        given["optimizer"] = with_preset(given["optimizer"])
    try:
        return RunConfig.model_validate_json(to_json(given), strict=True)
    except ValidationError as error:
        raise ConfigError(problems_of(error, given, _known_keys())) from None


def save_config(config: RunConfig, path: str | os.PathLike[str]) -> None:
    """Writes all values, defaults included, as YAML that loads to an equal RunConfig. Atomic."""
    write_whole(Path(path), OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json"))))


def _read_yaml(path: Path) -> DictConfig:
    try:
        config = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise ConfigError(Problem("--config", str(path), f"is not valid YAML: {_where(error)}")) from None
    except (OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(Problem("--config", str(path), f"cannot be read: {_first_line(error)}")) from None
    if not isinstance(config, DictConfig):
        raise ConfigError(Problem("--config", str(path), "must be a YAML mapping of sections"))
    return config


def _override(config: DictConfig, text: str) -> DictConfig:
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(Problem("override", text, "must be section.field=value"))
    try:
        return cast(DictConfig, OmegaConf.merge(config, OmegaConf.from_dotlist([text])))
    except yaml.YAMLError as error:
        raise ConfigError(Problem(key, value, f"is not a valid YAML value: {_where(error)}")) from None
    except OmegaConfBaseException as error:
        raise ConfigError(Problem(key, value, f"cannot be set: {_first_line(error)}")) from None


def _plain(config: DictConfig) -> dict[str, Any]:
    """The values as YAML has them, interpolations as they are written."""
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=False))


def _where(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(error)
    return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _with_deepspeed_file(config: DictConfig) -> DictConfig:
    """Puts the content of ds_config.json in place of its path, so that overrides can change parts of it."""
    values = _plain(config)
    path = values.get("deepspeed")
    if not isinstance(path, str):
        return config
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise ConfigError(Problem("deepspeed", path, f"is not valid JSON: {where}")) from None
    except (OSError, UnicodeDecodeError) as error:
        valid = f"must be a mapping of DeepSpeed keys or the path of a readable JSON file: {error}"
        raise ConfigError(Problem("deepspeed", path, valid)) from None
    if not isinstance(content, dict):
        raise ConfigError(Problem("deepspeed", path, "must hold a JSON object"))
    return OmegaConf.create(values | {"deepspeed": content})


def _interpolations(value: object, field: str = "") -> Iterator[Problem]:
    if isinstance(value, str) and "${" in value:
        yield Problem(field, value, "must be a plain value: interpolation is not supported")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _interpolations(item, f"{field}.{key}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            yield from _interpolations(item, field)


def _known_keys() -> list[str]:
    keys = {
        name: list(field.annotation.model_fields)
        for name, field in RunConfig.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }
    keys["tie"] = [field.name for field in dataclasses.fields(TieConfig)]
    keys["model"] = [*ModelConfig.model_fields, *transformer_fields()]
    keys["monitor.alerts"] = [field.name for field in dataclasses.fields(AlertSettings)]
    keys["monitor.wandb"] = list(WandbConfig.model_fields)
    return [*RunConfig.model_fields, *(f"{section}.{key}" for section in keys for key in keys[section])]
