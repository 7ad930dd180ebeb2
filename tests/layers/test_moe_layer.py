"""What a TiedMoELayer keeps after a pass."""

from __future__ import annotations

import gc

import pytest
import torch

from tests.distributed.training_run import RECOMPUTE
from tests.tiny_model import build, inputs, loss

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("recompute", ["none", "moe", "full"])
def test_no_input_of_a_recomputed_layer_outlives_backward(recompute: str, dispatcher: str) -> None:
    """Reentrant recompute begins at detached inputs: a graph that something holds keeps them and their gradients."""
    model = build(moe_token_dispatcher_type=dispatcher, **RECOMPUTE[recompute])
    gc.collect()
    before = {id(leaf) for leaf in _leaves_with_gradient()}
    loss(model, inputs()).backward()
    gc.collect()
    assert [tuple(leaf.shape) for leaf in _leaves_with_gradient() if id(leaf) not in before] == []


def _leaves_with_gradient() -> list[torch.Tensor]:
    return [
        thing for thing in gc.get_objects() if type(thing) is torch.Tensor and thing.is_leaf and thing.grad is not None
    ]
