"""Writes a source as a Hugging Face model: plain, with every layer's experts, or compact, with every bank's once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_tied.convert.architectures import COMPACT_PREFIX, architecture_of
from megatron_tied.convert.pieces import Piece, Written, entry_piece, experts_piece
from megatron_tied.convert.precision import common_dtype, written_dtype
from megatron_tied.convert.shards import ShardWriter
from megatron_tied.convert.sources import WeightSource
from megatron_tied.convert.tensors import KINDS, entries, expert_name, expert_shape, fused_name
from megatron_tied.errors import ConfigError, Problem
from megatron_tied.models.config import ModelConfig
from megatron_tied.topology import TieTopology

MODELLING_FILE = "modeling_megatron_tied.py"
# Keys that say nothing of the computation, and which an export keeps from the model that was imported.
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "output_router_logits", "router_aux_loss_coef")


def plain_config(config: ModelConfig, topology: TieTopology) -> dict[str, Any]:
    """config.json for the stock class. Raises `ConfigError` for a model that it cannot be."""
    if any(topology.num_experts(bank, config.num_moe_experts) != config.num_moe_experts for bank in topology.banks):
        compact = "; --to hf-compact can have it" if any(bank.is_tied for bank in topology.banks) else ""
        valid = (
            f"cannot be exported plain: the Hugging Face classes have one number of experts for all layers, here "
            f"{config.num_moe_experts}, and a softmax router has no bias that would mask experts added to the others"
        )
        raise ConfigError(Problem("tie.num_tied_experts", topology.tie.num_tied_experts, valid + compact))
    return architecture_of(config).write(config)


def compact_config(config: ModelConfig, topology: TieTopology) -> dict[str, Any]:
    """config.json for the classes of the modelling file that is written beside it.

    Raises `ConfigError` for a model that it cannot be.
    """
    architecture = architecture_of(config)
    for bank in topology.banks:
        if not bank.is_tied and topology.num_experts(bank, config.num_moe_experts) != config.num_moe_experts:
            valid = "cannot be exported: there, tied layers alone have a number of experts of their own"
            raise ConfigError(Problem("tie.num_tied_experts", topology.tie.num_tied_experts, valid))
    stem = architecture.causal_lm.removesuffix("ForCausalLM")
    module = MODELLING_FILE.removesuffix(".py")
    return architecture.write(config) | {
        "model_type": COMPACT_PREFIX + architecture.model_type,
        "architectures": [f"MegatronTied{architecture.causal_lm}"],
        "auto_map": {
            "AutoConfig": f"{module}.MegatronTied{stem}Config",
            "AutoModelForCausalLM": f"{module}.MegatronTied{architecture.causal_lm}",
        },
        "expert_banks": list(topology.bank_of_layer),
        "num_tied_experts": topology.tie.num_tied_experts,
    }


def hf_pieces(source: WeightSource, wanted: torch.dtype | None, *, compact: bool) -> Iterator[Piece]:
    """All tensors of a Hugging Face model, by its names."""
    for entry in entries(source.config, source.topology):
        yield entry_piece(source, entry, wanted, ours=False)
    for layer in source.topology.moe_layers:
        if not compact:
            yield from _single_experts(source, layer, wanted)
        elif source.topology.is_owner(layer):
            yield from _stacked(source, layer, wanted)


def write_hf(written: Written, directory: Path, *, json_config: dict[str, Any], compact: bool) -> None:
    """Write weights, their index and config.json into `directory`."""
    shards = ShardWriter(directory, lambda number: f"model-{number:05d}.safetensors")
    dtypes: dict[torch.dtype, int] = {}
    for name, tensor, state in written:
        shards.add(name, tensor)
        if state == "weight":
            dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + tensor.numel() * tensor.element_size()
        del tensor
    _name_shards(directory, shards, shards.finish())
    dtype = str(max(dtypes, key=dtypes.__getitem__)).removeprefix("torch.")
    write_json(directory / "config.json", json_config | {"torch_dtype": dtype})
    if compact:
        shutil.copyfile(Path(__file__).with_name(MODELLING_FILE), directory / MODELLING_FILE)


def kept_keys(original: dict[str, Any]) -> dict[str, Any]:
    """What an export takes over from the config.json of the model that was imported."""
    return {key: original[key] for key in _KEPT if key in original}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """As transformers writes its files: indented, one final line end."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def serving_warnings(config: ModelConfig) -> list[str]:
    """Where vLLM 0.33 is known to compute another model than transformers."""
    if architecture_of(config).model_type != "olmoe":
        return []
    found = []
    if config.qkv_clip is not None:
        found.append(f"vLLM's OLMoE does not clip queries, keys and values, here to {config.qkv_clip}")
    if config.layernorm_epsilon != 1e-5:
        found.append(f"vLLM's OLMoE has an epsilon of 1e-5 in its norms, not {config.layernorm_epsilon}")
    if not config.moe_router_pre_softmax:
        found.append("vLLM's OLMoE does not renormalise the weights of the chosen experts")
    return found


def _single_experts(source: WeightSource, layer: int, wanted: torch.dtype | None) -> Iterator[Piece]:
    for kind in KINDS:
        experts, *shape = expert_shape(source.config, source.topology, layer, kind)
        yield Piece(
            [expert_name(layer, expert, kind) for expert in range(experts)],
            [tuple(shape)] * experts,
            written_dtype(source.expert_dtype(layer, kind), wanted, "weight"),
            partial(source.read_experts, layer, kind),
        )


def _stacked(source: WeightSource, layer: int, wanted: torch.dtype | None) -> Iterator[Piece]:
    experts, width, hidden = expert_shape(source.config, source.topology, layer, "gate")
    both = (experts, 2 * width, hidden)
    stored = common_dtype(source.expert_dtype(layer, kind) for kind in ("gate", "up"))
    dtype = written_dtype(stored, wanted, "weight")

    def gate_and_up() -> Iterator[torch.Tensor]:
        whole = torch.empty(both, dtype=dtype)
        whole[:, :width] = source.read_experts(layer, "gate")
        whole[:, width:] = source.read_experts(layer, "up")
        yield whole

    yield Piece((fused_name(layer, "gate"),), (both,), dtype, gate_and_up)
    yield experts_piece(source, fused_name(layer, "down"), layer, "down", wanted)


def _name_shards(directory: Path, shards: ShardWriter, files: list[str]) -> None:
    """The names that transformers gives, which say how many there are, and the index that goes with them."""
    if len(files) == 1:
        (directory / files[0]).rename(directory / "model.safetensors")
        return
    named = {file: f"{Path(file).stem}-of-{len(files):05d}.safetensors" for file in files}
    for file, name in named.items():
        (directory / file).rename(directory / name)
    weight_map = {tensor: named[file] for tensor, file in shards.file_of.items()}
    index = {"metadata": {"total_size": shards.total_bytes}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)
