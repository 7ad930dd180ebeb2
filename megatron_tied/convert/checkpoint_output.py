"""Writes a source as a checkpoint of ours: weights alone, for `train.init_from`, a further conversion, or reading."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_tied import __version__
from megatron_tied.checkpoint.manifest import Chunk, Manifest, Tensor
from megatron_tied.checkpoint.storage import tensor_key
from megatron_tied.convert.pieces import Piece, Written, entry_piece, experts_piece
from megatron_tied.convert.precision import NAMES
from megatron_tied.convert.shards import ShardWriter
from megatron_tied.convert.sources import WeightSource
from megatron_tied.convert.tensors import EMBEDDING, KINDS, bank_name, entries
from megatron_tied.models.config import ModelConfig
from megatron_tied.topology import TieConfig


def checkpoint_pieces(source: WeightSource, wanted: torch.dtype | None) -> Iterator[Piece]:
    """All tensors of a checkpoint, by our names."""
    for entry in entries(source.config, source.topology):
        yield entry_piece(source, entry, wanted, ours=True)
    for bank in source.topology.banks:
        for kind in KINDS:
            yield experts_piece(source, bank_name(bank.owner, kind), bank.owner, kind, wanted)


def write_checkpoint(
    source: WeightSource, written: Written, directory: Path, *, run: dict[str, Any], imported: bool
) -> None:
    """Write the tensors of `written`, which are those of `source`, a manifest, and the start of a run's config.

    `run` is what the manifest says of the run, but for model and topology, which are the source's; `imported`, whether
    the weights are stored in the precision of the model that was imported, or in float32 from training here.
    """
    shards = ShardWriter(directory, lambda number: f"weights_{number:05d}.safetensors")
    tensors: dict[str, Tensor] = {}
    for name, tensor, state in written:
        offsets = [0] * tensor.dim()
        key = tensor_key(f"{state}/{name}", offsets)
        shards.add(key, tensor)
        dtype = str(tensor.dtype).removeprefix("torch.")
        chunk = Chunk(shards.file_of[key], offsets, list(tensor.shape))
        tensors[f"{state}/{name}"] = Tensor(dtype, list(tensor.shape), [chunk])
        del tensor
    shards.finish()
    manifest = Manifest(
        step=0,
        consumed_samples=0,
        world_size=1,
        software=f"megatron-tied {__version__}",
        run=run | {"model": source.config.model_dump(mode="json"), "tie": dataclasses.asdict(source.topology.tie)},
        trainer={
            "banks": [list(bank.layers) for bank in source.topology.banks],
            "weights_only": True,
            "imported": imported,
        },
        files=shards.checksums(),
        tensors=tensors,
    )
    manifest.write(directory)
    config = yaml.safe_dump(training_sections(source.config, source.topology.tie), sort_keys=False)
    (directory / "config.yaml").write_text(config, encoding="utf-8")


def training_sections(config: ModelConfig, tie: TieConfig) -> dict[str, Any]:
    """What the config file of a run with these weights has to say of model and banks."""
    model = config.model_dump(mode="json", exclude_defaults=True)
    default = TieConfig()
    changed = {name: value for name, value in dataclasses.asdict(tie).items() if value != getattr(default, name)}
    return {"model": model, "tie": {n: list(v) if isinstance(v, tuple) else v for n, v in changed.items()}}


def run_of(source: WeightSource, output: Path) -> dict[str, Any]:
    """What the manifest of a model that was never trained here says of its run; `precision` is its weights'."""
    return {
        "parallel": {},
        "data": {"train": "unknown: these weights were converted"},
        "train": {"run_dir": str(output), "precision": NAMES[source.dtype(EMBEDDING)]},
        "deepspeed": {},
    }
