"""The dispatcher of one rank against Megatron-Core's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_tied.layers.dispatcher import AllToAllDispatcher
from megatron_tied.layers.moe_layer import tied_layers
from tests.tiny_model import build, gradients, inputs, loss

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"moe_expert_capacity_factor": 1.0},
        {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
    ],
    ids=["plain", "drops tokens", "pads"],
)
def test_the_same_bits_without_sorting_twice(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for kind in (MoEAlltoAllTokenDispatcher, AllToAllDispatcher):
        model = build(**fields)
        for layer in tied_layers(model):
            assert type(layer.token_dispatcher) is AllToAllDispatcher
            layer.token_dispatcher.__class__ = kind
        if kind is AllToAllDispatcher:
            monkeypatch.setattr(token_dispatcher, "sort_chunks_by_idxs", lambda *_, **__: pytest.fail("sorted again"))
        value = loss(model, inputs())
        value.backward()
        results.append({"loss": value, **gradients(model)})
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name


def test_other_dispatchers_stay() -> None:
    (first, *_) = tied_layers(build(moe_token_dispatcher_type="allgather"))
    assert type(first.token_dispatcher) is token_dispatcher.MoEAllGatherTokenDispatcher
