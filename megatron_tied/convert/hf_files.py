"""The files of a Hugging Face directory: JSON objects, and which safetensors file has which tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from megatron_tied.convert.tensors import Shape
from megatron_tied.errors import ConfigError, Problem, listed

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Stored(NamedTuple):
    """Where a tensor is, and what its file's header says of it."""

    file: Path
    shape: Shape
    dtype: str


def read_json(path: Path, field: str = "--input") -> dict[str, Any]:
    """The JSON object in a file. Raises `ConfigError` about `field` for what is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(Problem(field, str(path), f"cannot be read: {error}")) from None
    except RecursionError:
        raise ConfigError(Problem(field, str(path), "cannot be read: it is nested too deeply")) from None
    if not isinstance(content, dict):
        raise ConfigError(Problem(field, str(path), "must hold a JSON object"))
    return content


def read_config(directory: Path) -> dict[str, Any]:
    """The directory's config.json."""
    if not (directory / CONFIG).exists():
        raise ConfigError(Problem("--input", str(directory), f"must be a Hugging Face model: no {CONFIG}"))
    return read_json(directory / CONFIG)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that have the model's weights. Raises `ConfigError` unless that is beyond doubt."""
    has_index, has_single = ((directory / name).is_file() for name in (INDEX, SINGLE))
    if has_index and has_single:
        valid = f"has both {SINGLE} and {INDEX}: take away the one that is not of this model"
        raise ConfigError(Problem("--input", str(directory), valid))
    if has_single:
        return [directory / SINGLE]
    if not has_index:
        valid = f"has no {SINGLE} and no {INDEX}; weights in other formats must be saved as safetensors first"
        raise ConfigError(Problem("--input", str(directory), valid))
    names = set(_weight_map(directory).values())
    if strangers := sorted(name for name in names if Path(name).name != name or name in ("", "..") or "\0" in name):
        raise ConfigError(
            Problem("--input", str(directory / INDEX), f"must name files beside it, not {strangers[0]!r}")
        )
    if missing := sorted(name for name in names if not (directory / name).is_file()):
        raise ConfigError(Problem("--input", str(directory), f"lacks {', '.join(missing)}, which its index names"))
    return [directory / name for name in sorted(names)]


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """All tensors of the model, from the headers of its files. Raises `ConfigError` where files and index disagree."""
    found: dict[str, Stored] = {}
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                here = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is no dictionary)
                told = {name: Stored(path, tuple(part.get_shape()), part.get_dtype()) for name, part in here.items()}
        except (OSError, SafetensorError) as error:
            raise ConfigError(Problem("--input", str(path), f"cannot be read: {error}")) from None
        if twice := sorted(found.keys() & told.keys()):
            valid = (
                f"has {listed(twice)} in {path.name} and in {found[twice[0]].file.name}: which is meant cannot be told"
            )
            raise ConfigError(Problem("--input", str(directory), valid))
        found |= told
    if (directory / INDEX).is_file():
        _check_index(directory, found)
    return found


def _check_index(directory: Path, found: dict[str, Stored]) -> None:
    weight_map = _weight_map(directory)
    if unnamed := sorted(found.keys() - weight_map.keys()):
        valid = f"does not name {listed(unnamed)}, though a file that it names has it: make the index anew"
        raise ConfigError(Problem("--input", str(directory / INDEX), valid))
    if wrong := sorted(name for name, file in weight_map.items() if name not in found or found[name].file.name != file):
        valid = f"names files for {listed(wrong)} that do not have them: make the index anew"
        raise ConfigError(Problem("--input", str(directory / INDEX), valid))


def _weight_map(directory: Path) -> dict[str, str]:
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        valid = "is no index of safetensors files: weight_map must give a file's name for every tensor's"
        raise ConfigError(Problem("--input", str(directory / INDEX), valid))
    return weight_map
