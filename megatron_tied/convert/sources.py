"""Where weights come from: a lazy, read-only view of one model under our names, with experts by layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

from megatron_tied.checkpoint.manifest import BrokenCheckpointError, Manifest
from megatron_tied.checkpoint.weights import WeightReader
from megatron_tied.convert.tensors import KINDS, Shape, bank_name, entries, expert_shape, some
from megatron_tied.errors import ConfigError, Problem
from megatron_tied.models.config import ModelConfig
from megatron_tied.topology import TieConfig, TieTopology


class WeightSource(Protocol):
    """One model's weights, read when asked for and never kept; names and shapes are those of our checkpoints.

    Routed experts are asked for by layer, whichever bank has them: [experts, rows, columns] of `gate`, `up` or `down`.
    """

    config: ModelConfig
    topology: TieTopology

    def dtype(self, name: str) -> torch.dtype:
        """The precision in which `name`, a tensor outside the routed experts, is stored."""

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`."""

    def expert_dtype(self, layer: int, kind: str) -> torch.dtype:
        """The precision in which these matrices are stored."""

    def read_experts(self, layer: int, kind: str) -> torch.Tensor:
        """One kind of the matrices of all experts that `layer` uses."""


class CheckpointSource:
    """The weights of a checkpoint of ours, or of a run's latest one.

    Raises `ConfigError` for a checkpoint that is not sound, or whose tensors are not those of its config.
    """

    def __init__(self, directory: Path):
        try:
            self._reader = WeightReader(directory)
        except BrokenCheckpointError as error:
            raise ConfigError(Problem("--input", str(directory), f"is not sound: {error}")) from None
        run = self._reader.manifest.run
        self.remarks: list[str] = []
        self.config = _with_vocabulary(ModelConfig.resolve(run["model"]), self._reader)
        self.topology = self.config.topology(TieConfig(**run["tie"]))
        if self.topology.shares_more:
            valid = "cannot be converted: a Hugging Face model has attention and router of its own in every layer"
            raise ConfigError(Problem("tie.share", self.topology.tie.share, f"{valid}, and banks are retied alone"))
        self._states = {entry.ours: entry.state for entry in entries(self.config, self.topology)}
        if problems := list(self._problems()):
            raise ConfigError(problems)

    @property
    def directory(self) -> Path:
        """The checkpoint itself."""
        return self._reader.directory

    @property
    def manifest(self) -> Manifest:
        """What its manifest says."""
        return self._reader.manifest

    def dtype(self, name: str) -> torch.dtype:
        """See `WeightSource`."""
        return getattr(torch, self.manifest.tensors[f"{self._states[name]}/{name}"].dtype)

    def read(self, name: str) -> torch.Tensor:
        """See `WeightSource`."""
        return self._reader.read(name, state=self._states[name])

    def expert_dtype(self, layer: int, kind: str) -> torch.dtype:
        """See `WeightSource`."""
        return getattr(torch, self.manifest.tensors[f"weight/{self._bank_name(layer, kind)}"].dtype)

    def read_experts(self, layer: int, kind: str) -> torch.Tensor:
        """See `WeightSource`."""
        return self._reader.read(self._bank_name(layer, kind))

    def _bank_name(self, layer: int, kind: str) -> str:
        return bank_name(self.topology.bank(layer).owner, kind)

    def _problems(self) -> Iterator[Problem]:
        expected = {f"{entry.state}/{entry.ours}": entry.shape for entry in entries(self.config, self.topology)}
        for bank in self.topology.banks:
            for kind in KINDS:
                shape = expert_shape(self.config, self.topology, bank.owner, kind)
                expected[f"weight/{bank_name(bank.owner, kind)}"] = shape
        stored = {
            name: tuple(tensor.shape)
            for name, tensor in self.manifest.tensors.items()
            if name.partition("/")[0] in ("weight", "buffer")
        }
        yield from tensor_problems(self.directory, expected, stored)


def tensor_problems(where: Path, expected: dict[str, Shape], stored: dict[str, Shape]) -> Iterator[Problem]:
    """A problem for tensors that are missing, one for those that are too many, and one for wrong shapes."""
    missing, extra = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    wrong = sorted(name for name in expected.keys() & stored.keys() if expected[name] != stored[name])
    if missing:
        yield Problem("--input", str(where), f"lacks {some(missing)}, which its config asks for")
    if extra:
        yield Problem("--input", str(where), f"has {some(extra)}, which its config does not ask for")
    if wrong:
        told = [f"{name} {list(stored[name])} in place of {list(expected[name])}" for name in wrong]
        yield Problem("--input", str(where), f"has tensors of another shape than its config says: {some(told)}")


def _with_vocabulary(config: ModelConfig, reader: WeightReader) -> ModelConfig:
    """The size is the tokenizer's where the config of a run leaves it open: the embedding has it."""
    shape = reader.shapes().get("embedding.word_embeddings.weight")
    return config if config.vocab_size or not shape else config.model_copy(update={"vocab_size": shape[0]})
