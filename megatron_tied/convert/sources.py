"""Where weights come from: a lazy, read-only view of one model under our names, with experts by layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

from megatron_tied.checkpoint.manifest import BrokenCheckpointError, Manifest
from megatron_tied.checkpoint.verify import verify
from megatron_tied.checkpoint.weights import WeightReader
from megatron_tied.convert.tensors import EMBEDDING, KINDS, Shape, bank_name, entries, expert_shape
from megatron_tied.errors import ConfigError, Problem, listed
from megatron_tied.models.config import ModelConfig
from megatron_tied.topology import TieConfig, TieTopology


class WeightSource(Protocol):
    """One model's weights, read when asked for and never kept; names and shapes are those of our checkpoints.

    Routed experts are asked for by layer, whichever bank has them: [experts, rows, columns] of `gate`, `up` or `down`.
    vocab_size: how many token ids the model knows.
    """

    config: ModelConfig
    topology: TieTopology
    vocab_size: int

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
        self.config = ModelConfig.resolve(run["model"])
        embedding = self._reader.shapes().get(EMBEDDING)
        if self.config.vocab_size is None and embedding is not None:
            # Where a run's config leaves the size to the tokenizer, the embedding has it.
            self.config = self.config.model_copy(update={"vocab_size": embedding[0]})
        self.topology = self.config.topology(TieConfig(**run["tie"]))
        if self.topology.shares_more:
            valid = "cannot be converted: a Hugging Face model has attention and router of its own in every layer"
            raise ConfigError(Problem("tie.share", self.topology.tie.share, f"{valid}, and banks are retied alone"))
        self._entries = {entry.ours: entry for entry in entries(self.config, self.topology)}
        self.vocab_size = self._entries[EMBEDDING].shape[0]
        if problems := list(self._problems()):
            raise ConfigError(problems)

    def check_content(self) -> None:
        """Compare every file with its checksum. Raises `ConfigError` for a damaged one."""
        try:
            verify(self.directory, self._reader.manifest)
        except BrokenCheckpointError as error:
            raise ConfigError(Problem("--input", str(self.directory), f"is not sound: {error}")) from None

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
        return self._dtype_of(f"{self._entries[name].state}/{name}")

    def read(self, name: str) -> torch.Tensor:
        """See `WeightSource`."""
        return self._reader.read(name, state=self._entries[name].state)

    def expert_dtype(self, layer: int, kind: str) -> torch.dtype:
        """See `WeightSource`."""
        return self._dtype_of(f"weight/{self._bank_name(layer, kind)}")

    def read_experts(self, layer: int, kind: str) -> torch.Tensor:
        """See `WeightSource`."""
        return self._reader.read(self._bank_name(layer, kind))

    def _dtype_of(self, key: str) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.manifest.tensors[key].dtype)
        return dtype

    def _bank_name(self, layer: int, kind: str) -> str:
        return bank_name(self.topology.bank(layer).owner, kind)

    def _problems(self) -> Iterator[Problem]:
        expected = {f"{entry.state}/{name}": entry.shape for name, entry in self._entries.items()}
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
        yield Problem("--input", str(where), f"lacks {listed(missing)}, which its config asks for")
    if extra:
        yield Problem("--input", str(where), f"has {listed(extra)}, which its config does not ask for")
    if wrong:
        told = [f"{name} {list(stored[name])} in place of {list(expected[name])}" for name in wrong]
        yield Problem("--input", str(where), f"has tensors of another shape than its config says: {listed(told)}")
