"""A model whose parameters Transformer Engine has named writes and reads the checkpoints of one without."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tied import TieConfig
from megatron_tied.checkpoint.directory import CheckpointDirectory
from megatron_tied.checkpoint.layout import model_layout
from megatron_tied.checkpoint.loader import load_weights, verified
from megatron_tied.checkpoint.manifest import Manifest
from megatron_tied.checkpoint.names import is_norm
from megatron_tied.checkpoint.rectangles import state_dict
from megatron_tied.checkpoint.saver import Saver
from megatron_tied.engine.partitions import WEIGHT, Fragment
from tests.tiny_model import build

pytestmark = pytest.mark.usefixtures("one_process")

DENSE_FIRST = {"moe_layer_freq": [0, 1, 1, 1, 1, 1]}
MODELS: dict[str, dict[str, Any]] = {
    "attention": {"qk_layernorm": True},
    "LayerNorm": {"normalization": "LayerNorm", "qk_layernorm": False},
    "latent attention": {
        **{"multi_latent_attention": True, "num_query_groups": 4, "qk_layernorm": True, "rope_type": "rope"},
        **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 8},
    },
}


def model(name: str, seed: int) -> torch.nn.Module:
    made = build(TieConfig(banks=[0, 1, 1, 2, 2]), seed=seed, **DENSE_FIRST, **MODELS[name])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.rand(parameter.shape, generator=generator))
    return made


def fused(named: torch.nn.Module) -> torch.nn.Module:
    """The model itself, now with the names that get_gpt_layer_with_transformer_engine_spec gives its parameters."""
    for layer in named.decoder.layers:
        attention = layer.self_attention
        if hasattr(attention, "linear_qkv"):
            move(layer, "input_layernorm", attention.linear_qkv)
        else:
            move(attention, "q_layernorm", attention.linear_q_up_proj)
            move(attention, "kv_layernorm", attention.linear_kv_up_proj)
        if hasattr(layer.mlp, "linear_fc1"):
            move(layer, "pre_mlp_layernorm", layer.mlp.linear_fc1)
    return named


def move(owner: torch.nn.Module, norm: str, linear: torch.nn.Module) -> None:
    for name, parameter in getattr(owner, norm).named_parameters():
        linear.register_parameter(f"layer_norm_{name}", parameter)
    setattr(owner, norm, torch.nn.Identity())


def saved(source: torch.nn.Module, directory: Path) -> Path:
    layout = model_layout(source)
    whole = [Fragment(name, 0, {WEIGHT: value.detach().view(-1)}) for name, value in source.named_parameters()]
    saver = Saver(
        CheckpointDirectory(directory), torch.distributed.group.WORLD, in_background=False, keep_last=1, keep_every=0
    )
    manifest = Manifest(step=1, consumed_samples=0, world_size=1, software="", run={}, trainer={})
    saver.save(state_dict(whole, layout, saving=True), manifest, set())
    (outcome,) = saver.outcomes()
    assert outcome.failure is None
    return outcome.path


def tensors(built: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {block.tensor: block.shape for found in model_layout(built).values() for block in found.blocks}


@pytest.mark.parametrize("name", MODELS)
def test_either_reads_what_the_other_wrote(name: str, tmp_path: Path) -> None:
    plain, with_names = model(name, seed=1), fused(model(name, seed=1))
    for source, other in ((plain, fused), (with_names, lambda built: built)):
        target = other(model(name, seed=2))
        load_weights(target, verified(saved(source, tmp_path)))
        expected = dict((with_names if source is plain else plain).named_parameters())
        found = dict(target.named_parameters())
        assert found.keys() == expected.keys()
        assert [name for name, value in found.items() if not torch.equal(value, expected[name])] == []


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_has_the_names_of_layers_without_transformer_engine(name: str) -> None:
    plain = model(name, seed=1)
    assert tensors(fused(model(name, seed=1))) == tensors(plain)
    dense = {tensor for tensor in tensors(plain) if ".experts." not in tensor}
    assert dense == {found for found, _ in plain.named_parameters() if ".experts." not in found}


@pytest.mark.parametrize("name", MODELS)
def test_norms_are_told_from_other_vectors(name: str) -> None:
    for built in (model(name, seed=1), fused(model(name, seed=1))):
        norms = {found for found, _ in built.named_parameters() if is_norm(found)}
        assert norms == {found for found, value in built.named_parameters() if value.dim() == 1}
        assert all(re.search(r"layer_?norm", found) for found in norms)
