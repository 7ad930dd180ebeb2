"""Which parameters tensor parallelism cuts, where, and what a rank gets of them."""

from __future__ import annotations

import pytest
import torch
from megatron.core import parallel_state

from megatron_tied import TieConfig
from megatron_tied.layers.tensor_parallel import is_tensor_parallel, local_part, mark_tensor_parallel, whole_shape
from tests.tiny_model import build

EVERYTHING = {
    "moe_layer_freq": [0, 1, 1, 1, 1, 1],
    "moe_shared_expert_intermediate_size": 16,
    "moe_shared_expert_gate": True,
    "add_qkv_bias": True,
    "num_query_groups": 4,
    "qk_norm_scope": "projection",
}
CUT = {
    "embedding.word_embeddings.weight": (0, 1),
    "decoder.layers.0.self_attention.linear_proj.weight": (1, 1),
    "decoder.layers.0.self_attention.linear_qkv.weight": (0, 1),
    "decoder.layers.0.self_attention.linear_qkv.bias": (0, 1),
    "decoder.layers.0.self_attention.q_layernorm.weight": (0, 1),
    "decoder.layers.0.self_attention.k_layernorm.weight": (0, 1),
    "decoder.layers.0.mlp.linear_fc1.weight": (0, 2),
    "decoder.layers.0.mlp.linear_fc2.weight": (1, 1),
    "decoder.layers.1.mlp.shared_experts.linear_fc1.weight": (0, 2),
    "decoder.layers.1.mlp.shared_experts.linear_fc2.weight": (1, 1),
    "output_layer.weight": (0, 1),
}
WHOLE = {
    "decoder.layers.1.mlp.router.weight",
    "decoder.layers.1.mlp.shared_experts.gate_weight",
    "decoder.layers.1.input_layernorm.weight",
    "decoder.final_layernorm.weight",
}


@pytest.fixture
def model(one_process: None) -> torch.nn.Module:
    return build(TieConfig(), **EVERYTHING)


def test_marks_say_where_each_parameter_is_cut(model: torch.nn.Module) -> None:
    parameters = dict(model.named_parameters())
    for name, expected in CUT.items():
        parameter = parameters[name]
        assert (parameter.partition_dim, parameter.partition_stride) == expected, name
    experts = {name for name in parameters if ".experts." in name}
    assert experts
    assert not [name for name in WHOLE | experts if is_tensor_parallel(parameters[name])]


@pytest.mark.parametrize("backend", ["grouped", "sequential"])
def test_experts_are_never_cut(backend: str, one_process: None) -> None:
    experts = [p for name, p in build(expert_backend=backend).named_parameters() if ".experts." in name]
    assert experts
    assert not any(map(is_tensor_parallel, experts))


def test_marks_come_back_after_the_meta_device(model: torch.nn.Module) -> None:
    model.to("meta").to_empty(device="cpu")
    assert not any(map(is_tensor_parallel, model.parameters()))
    mark_tensor_parallel(model)
    assert {name for name in CUT if is_tensor_parallel(model.get_parameter(name))} == CUT.keys()


def test_a_rank_gets_its_gate_rows_and_its_up_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda: 1)
    weight = torch.nn.Parameter(torch.empty(4, 3))
    weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, 0, 2
    assert whole_shape(weight) == (8, 3)
    rows = local_part(torch.arange(8.0)[:, None].expand(8, 3), weight)[:, 0]
    assert rows.tolist() == [2, 3, 6, 7]
    whole = torch.nn.Parameter(torch.empty(4, 3))
    assert whole_shape(whole) == (4, 3)
    assert local_part(whole, whole) is whole
