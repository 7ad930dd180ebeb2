"""What a checkpoint holds, as a table; from its manifest and the sizes of its files alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import yaml
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_tied.checkpoint.manifest import Manifest, Tensor

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}
_EXPERTS = ".mlp.experts."


def report(directory: Path, manifest: Manifest) -> RenderableType:
    """The run, its banks, all tensors, its files, and its config."""
    return Group(
        Text(_summary(directory, manifest)),
        _bank_table(manifest),
        _tensor_table(manifest),
        _file_table(manifest),
        Text("config", style="bold"),
        Text(yaml.safe_dump(manifest.run, sort_keys=False, default_flow_style=None, width=120)),
    )


def _summary(directory: Path, manifest: Manifest) -> str:
    run = manifest.run
    parallel = ", ".join(f"{key} {value}" for key, value in run["parallel"].items() if value != 1) or "no parallelism"
    weights = sum(math.prod(tensor.shape) for name, tensor in manifest.tensors.items() if name.startswith("weight/"))
    if manifest.trainer.get("weights_only"):
        return f"{directory}\nconverted, weights only: {weights:,} parameters; {_files(manifest)}\n"
    stage = run["deepspeed"].get("zero_optimization", {}).get("stage", 1)
    return (
        f"{directory}\n"
        f"step {manifest.step:,} of {run['train']['steps']:,}, {manifest.consumed_samples:,} samples consumed\n"
        f"{weights:,} parameters; {_files(manifest)}\n"
        f"written by {manifest.world_size} processes, {parallel}, ZeRO {stage}, {run['train']['precision']}\n"
    )


def _files(manifest: Manifest) -> str:
    size = sum(file.bytes for file in manifest.files.values())
    return f"{size:,} bytes in {len(manifest.files)} files; format {manifest.format}, {manifest.software}"


def _bank_table(manifest: Manifest) -> Table:
    table = _table("expert bank", "owner", "layers", "experts", "gate, up: shape", "dtype", "bytes with states")
    banks: dict[str, dict[str, Tensor]] = {}
    for name, tensor in manifest.tensors.items():
        if _EXPERTS in name:
            owner, _, kind = name.partition(_EXPERTS)
            banks.setdefault(owner.partition("/")[2], {})[f"{owner.partition('/')[0]}/{kind}"] = tensor
    for index, (owner, tensors) in enumerate(sorted(banks.items(), key=lambda item: _layer(item[0]))):
        up = tensors["weight/up"]
        layers = manifest.trainer["banks"][index]
        size = sum(map(_size, tensors.values()))
        shape = " x ".join(map(str, up.shape[1:]))
        table.add_row(str(index), owner, ", ".join(map(str, layers)), str(up.shape[0]), shape, up.dtype, f"{size:,}")
    return table


def _tensor_table(manifest: Manifest) -> Table:
    table = _table("tensor", "shape", "dtype", "chunks", "states", "bytes with states")
    for name, tensors in _by_parameter(manifest):
        first = next(iter(tensors.values()))
        states = ", ".join(state for state in tensors if state != "weight")
        shape, size = " x ".join(map(str, first.shape)), sum(map(_size, tensors.values()))
        table.add_row(name, shape, first.dtype, str(len(first.chunks)), states, f"{size:,}")
    return table


def _file_table(manifest: Manifest) -> Table:
    table = _table("file", "bytes", "sha256")
    for name, file in manifest.files.items():
        table.add_row(name, f"{file.bytes:,}", file.sha256)
    return table


def _by_parameter(manifest: Manifest) -> Iterator[tuple[str, dict[str, Tensor]]]:
    found: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in manifest.tensors.items():
        state, _, name = full_name.partition("/")
        if state != "rng":
            found.setdefault(name, {})[state] = tensor
    yield from sorted(found.items(), key=lambda item: (_layer(item[0]), item[0]))


def _layer(name: str) -> int:
    """The layer's number in a name such as `decoder.layers.3.mlp`, or -1."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def _size(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * _BYTES[tensor.dtype]


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    for column in columns:
        numeric = column in ("bytes", "bytes with states", "experts", "chunks")
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    return table
