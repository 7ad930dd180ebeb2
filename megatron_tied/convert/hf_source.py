"""A Hugging Face model directory as a source of weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from megatron_tied.convert.architectures import COMPACT_PREFIX, Architecture, architecture_named
from megatron_tied.convert.hf_files import Stored, read_config, stored_tensors
from megatron_tied.convert.precision import common_dtype
from megatron_tied.convert.sources import tensor_problems
from megatron_tied.convert.tensors import EMBEDDING, KINDS, Shape, entries, expert_name, expert_shape, fused_name
from megatron_tied.convert.translations import refuse
from megatron_tied.errors import ConfigError, Problem
from megatron_tied.models.config import ModelConfig
from megatron_tied.topology import TieConfig, TieTopology

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Computed from the config, and stored by old versions.
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class HuggingFaceSource:
    """The weights of a Hugging Face directory: safetensors, experts one by one or stacked, compact or with all layers.

    Raises `ConfigError` for an unknown architecture, for keys of its config that cannot be expressed here, and for
    tensors that are missing, too many, or of another shape than the config says. `remarks` are lines to show.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.json = read_config(directory)
        self.architecture: Architecture = architecture_named(self.json.get("model_type"))
        self.config: ModelConfig = self.architecture.read(self.json)
        self.topology = self._topology()
        self.remarks = [
            f"config.json: {key} = {self.json[key]!r} is not known here, and not converted"
            for key in self.architecture.unknown(self.json)
        ]
        self._entries = {entry.ours: entry for entry in entries(self.config, self.topology)}
        self.vocab_size = self._entries[EMBEDDING].shape[0]
        self._stored = dict(self._wanted(stored_tensors(directory)))
        # Which form the experts of each layer are stored in.
        self._fused = {
            layer: fused_name(self._stored_layer(layer), "up") in self._stored for layer in self.topology.moe_layers
        }
        if problems := [*self._tensor_problems(), *self._dtype_problems()]:
            raise ConfigError(problems)
        self._check_output_layer()

    @property
    def is_compact(self) -> bool:
        """Whether each bank's experts are stored once, under the bank's first layer."""
        model_type: str = self.json["model_type"]
        return model_type.startswith(COMPACT_PREFIX)

    def dtype(self, name: str) -> torch.dtype:
        """See `WeightSource`."""
        return self._dtype_of(self._entries[name].theirs)

    def read(self, name: str) -> torch.Tensor:
        """See `WeightSource`."""
        entry = self._entries[name]
        return entry.join([self._read(part) for part in entry.theirs])

    def expert_dtype(self, layer: int, kind: str) -> torch.dtype:
        """See `WeightSource`."""
        return self._dtype_of(self._expert_tensors(layer, kind))

    def read_experts(self, layer: int, kind: str) -> torch.Tensor:
        """See `WeightSource`."""
        shape = expert_shape(self.config, self.topology, layer, kind)
        whole = torch.empty(shape, dtype=self.expert_dtype(layer, kind))
        if not self._fused[layer]:
            self._read_into(whole, self._expert_tensors(layer, kind))
            return whole
        (name,) = self._expert_tensors(layer, kind)
        first = shape[1] if kind == "up" else 0
        with safe_open(self._stored[name].file, framework="pt") as file:
            whole.copy_(file.get_slice(name)[:, first : first + shape[1]])
        return whole

    def _topology(self) -> TieTopology:
        if not self.is_compact:
            return self.config.topology(TieConfig())
        banks = self.json.get("expert_banks")
        if not isinstance(banks, list):
            raise refuse("expert_banks", banks, "must be the bank of every layer, null for a dense one")
        of_moe_layers = tuple(bank for bank in banks if bank is not None)
        return self.config.topology(TieConfig(banks=of_moe_layers, num_tied_experts=self.json.get("num_tied_experts")))

    def _stored_layer(self, layer: int) -> int:
        """Under which layer its experts are stored: a compact directory has a bank's once."""
        return self.topology.bank(layer).owner if self.is_compact else layer

    def _expert_tensors(self, layer: int, kind: str) -> list[str]:
        layer_stored = self._stored_layer(layer)
        if self._fused[layer]:
            return [fused_name(layer_stored, kind)]
        experts = expert_shape(self.config, self.topology, layer, kind)[0]
        return [expert_name(layer_stored, expert, kind) for expert in range(experts)]

    def _dtype_of(self, names: Iterable[str]) -> torch.dtype:
        """That of a tensor put together from these, in which none of them is rounded."""
        return common_dtype(_DTYPES[dtype] for dtype in {self._stored[name].dtype for name in names})

    def _read(self, name: str) -> torch.Tensor:
        with safe_open(self._stored[name].file, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            # A copy: what the file is mapped to counts as memory for as long as it is held.
            return tensor.clone()

    def _read_into(self, whole: torch.Tensor, names: Iterable[str]) -> None:
        by_file: dict[Path, list[tuple[int, str]]] = {}
        for index, name in enumerate(names):
            by_file.setdefault(self._stored[name].file, []).append((index, name))
        for path, wanted in by_file.items():
            with safe_open(path, framework="pt") as file:
                for index, name in wanted:
                    whole[index] = file.get_tensor(name)

    def _wanted(self, stored: dict[str, Stored]) -> Iterator[tuple[str, Stored]]:
        """All but what is known to be of no use here."""
        later = {layer for name in stored if (layer := _layer(name)) >= self.config.num_layers}
        if later and self.json.get("num_nextn_predict_layers"):
            self.remarks.append(
                f"layers {', '.join(map(str, sorted(later)))} predict further tokens ahead: they are left out"
            )
        else:
            later = set()
        for name, tensor in stored.items():
            if not _DERIVED.search(name) and _layer(name) not in later:
                yield name, tensor

    def _tensor_problems(self) -> Iterator[Problem]:
        expected: dict[str, Shape] = {}
        for entry in self._entries.values():
            expected |= dict(zip(entry.theirs, entry.shapes, strict=True))
        for layer in self.topology.moe_layers:
            expected |= self._expert_shapes(layer)
        stored = {name: tensor.shape for name, tensor in self._stored.items()}
        if self.config.share_embeddings_and_output_weights:
            stored.pop("lm_head.weight", None)
        yield from tensor_problems(self.directory, expected, stored)

    def _expert_shapes(self, layer: int) -> dict[str, Shape]:
        shapes = {kind: expert_shape(self.config, self.topology, layer, kind) for kind in KINDS}
        if not self._fused[layer]:
            return {name: shapes[kind][1:] for kind in KINDS for name in self._expert_tensors(layer, kind)}
        experts, width, hidden = shapes["gate"]
        names = {kind: self._expert_tensors(layer, kind)[0] for kind in KINDS}
        return {names["gate"]: (experts, 2 * width, hidden), names["down"]: shapes["down"]}

    def _dtype_problems(self) -> Iterator[Problem]:
        foreign = {tensor.dtype for tensor in self._stored.values()} - _DTYPES.keys()
        if foreign:
            valid = f"has tensors of {', '.join(sorted(foreign))}; must be of {', '.join(_DTYPES)}"
            yield Problem("--input", str(self.directory), valid)

    def _check_output_layer(self) -> None:
        """With tied embeddings an output layer may be stored, too, if it is the same."""
        if not self.config.share_embeddings_and_output_weights or "lm_head.weight" not in self._stored:
            return
        embedding, output = self._read("model.embed_tokens.weight"), self._read("lm_head.weight")
        # One of them may have been rounded since.
        if not (torch.equal(embedding.to(output.dtype), output) or torch.equal(embedding, output.to(embedding.dtype))):
            stored = " and ".join(self._stored[name].dtype for name in ("lm_head.weight", "model.embed_tokens.weight"))
            valid = (
                f"has another lm_head.weight than model.embed_tokens.weight (stored as {stored}), "
                f"though tie_word_embeddings is true"
            )
            raise ConfigError(Problem("--input", str(self.directory), valid))


def _layer(name: str) -> int:
    match = _LAYER.match(name)
    return int(match[1]) if match else -1
