"""What a layer saves for backward, by formula and as autograd's hooks see it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import megatron_tied as mt
from megatron_tied.planner.activations import UNFUSED, layer_activations, loss_activations
from megatron_tied.planner.layout import Layout, Recompute
from tests.distributed.training_run import RECOMPUTE

pytestmark = pytest.mark.usefixtures("one_process")

SEQUENCES, LENGTH = 2, 64
MODEL: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "num_moe_experts": 8,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 96,
    "vocab_size": 512,
    "qk_layernorm": True,
    "moe_aux_loss_coeff": 0.01,
}
CASES: list[dict[str, Any]] = [
    {},
    {"num_query_groups": 4},
    {"qk_layernorm": False},
    {"qk_layernorm": False, "num_query_groups": 4},
    {"normalization": "LayerNorm"},
    {"gated_linear_unit": False, "activation": "gelu"},
    {"moe_router_topk": 4, "moe_router_pre_softmax": True},
    {"moe_shared_expert_intermediate_size": 160},
    {"moe_layer_freq": [1, 0, 1]},
    {"qkv_clip": 8.0},
    {"qk_norm_scope": "projection"},
    RECOMPUTE["moe_act"],
    RECOMPUTE["moe"],
]
# Options under which tensors share storages in more ways than the formula follows.
ROUGHLY = {"num_query_groups", "normalization", "qkv_clip", "qk_norm_scope"}


def saved_by_layer(model: torch.nn.Module, index: int) -> int:
    """Bytes of the storages that `index`'s forward saves, parameters aside, each once."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    found: dict[int, torch.UntypedStorage] = {}
    inside = False

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if inside and storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage
        return tensor

    def enter(*_: Any) -> None:
        nonlocal inside
        inside = True

    def leave(*_: Any) -> None:
        nonlocal inside
        inside = False

    layer = model.decoder.layers[index]
    layer.register_forward_pre_hook(enter)
    layer.register_forward_hook(leave)
    tokens = torch.randint(512, (SEQUENCES, LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(tokens, torch.arange(LENGTH).expand_as(tokens), None, labels=tokens)
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("fields", CASES, ids=lambda fields: " ".join(map(str, fields.items())) or "plain")
def test_a_layer_saves_what_is_planned(fields: dict[str, Any], precision: str) -> None:
    model = mt.ModelConfig.resolve({**MODEL, **fields})
    topology = model.topology(mt.TieConfig())
    layout = Layout(world_size=1, seq_length=LENGTH, micro_batch_size=SEQUENCES, precision=precision)
    built = mt.build_gpt_model(model, mt.TieConfig(), precision=precision)
    planned = layer_activations(model, topology, layout, 1, UNFUSED).kept(Recompute.of(model).modules)
    near = 0.06 if ROUGHLY & fields.keys() else 0.01
    assert planned == pytest.approx(saved_by_layer(built, 1), rel=near)


def test_the_loss_keeps_fp32_exponentials_and_for_a_moment_the_logits() -> None:
    model = mt.ModelConfig.resolve(MODEL)
    for precision, width in (("fp32", 0), ("bf16", 2)):
        layout = Layout(world_size=1, seq_length=LENGTH, precision=precision)
        ends = loss_activations(model, layout, 512, UNFUSED)
        assert ends.extra == LENGTH * 512 * width
        # PyTorch's own norm turns bf16 to fp32, and keeps that and what it made of it.
        norm, its_output = (2 if width else 1) * 128 * 4 + 4, 128 * (width or 4)
        assert ends.saved == LENGTH * (512 * 4 + norm + its_output)


def test_only_other_ranks_make_an_expert_parallel_rank_busier() -> None:
    model = mt.ModelConfig.resolve(MODEL)
    topology = model.topology(mt.TieConfig())

    def dispatched(ranks: int, imbalance: float) -> int:
        layout = Layout(world_size=ranks, seq_length=LENGTH, expert_parallel=ranks, imbalance=imbalance)
        return layer_activations(model, topology, layout, 1, UNFUSED).saved["dispatched tokens"]

    assert dispatched(1, 1.0) == dispatched(1, 1.5)
    assert dispatched(4, 1.5) == 1.5 * dispatched(4, 1.0) == 1.5 * dispatched(1, 1.0)
