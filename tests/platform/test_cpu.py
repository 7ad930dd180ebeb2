"""The shims of a CPU host: named random streams, and recompute that draws the same dropout again."""

import pytest
import torch
from megatron.core.tensor_parallel import random

from tests.tiny_model import build, gradients, inputs, loss

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shims are for hosts without CUDA")


@pytest.fixture
def tracker() -> random.CudaRNGStatesTracker:
    """An empty tracker, of the class that Megatron-Core now makes."""
    return random.CudaRNGStatesTracker()


def test_a_fork_draws_from_its_stream_and_leaves_the_outer_one(tracker):
    tracker.add("dropout", 7)
    tracker.add("other", 8)
    assert tracker.is_initialized()
    torch.manual_seed(0)
    outer = torch.get_rng_state()
    drawn = []
    for name in ("dropout", "dropout", "other"):
        with tracker.fork(name):
            drawn.append(torch.rand(3))
    assert torch.equal(torch.get_rng_state(), outer)
    expected = torch.Generator().manual_seed(7)
    assert torch.equal(drawn[0], torch.rand(3, generator=expected))
    assert torch.equal(drawn[1], torch.rand(3, generator=expected))
    assert torch.equal(drawn[2], torch.rand(3, generator=torch.Generator().manual_seed(8)))


def test_a_fork_goes_on_where_it_stopped_after_an_error(tracker):
    tracker.add("dropout", 7)
    torch.manual_seed(0)
    outer = torch.get_rng_state()
    with pytest.raises(TypeError), tracker.fork("dropout"):
        torch.rand(3) + None
    assert torch.equal(torch.get_rng_state(), outer)
    with tracker.fork("dropout"):
        second = torch.rand(3)
    expected = torch.Generator().manual_seed(7)
    torch.rand(3, generator=expected)
    assert torch.equal(second, torch.rand(3, generator=expected))


@pytest.mark.parametrize(("name", "seed"), [("dropout", 8), ("other", 7)])
def test_a_name_or_seed_is_added_once(tracker, name, seed):
    tracker.add("dropout", 7)
    with pytest.raises(ValueError, match="already exists"):
        tracker.add(name, seed)


def test_states_can_be_taken_and_put_back(tracker):
    tracker.add("dropout", 7)
    states = tracker.get_states()
    with tracker.fork("dropout"):
        first = torch.rand(3)
    tracker.set_states(states)
    with tracker.fork("dropout"):
        assert torch.equal(torch.rand(3), first)


@pytest.mark.usefixtures("one_process")
def test_recompute_draws_the_same_dropout_again():
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}

    def trained(seed: int, **recompute: object) -> dict[str, torch.Tensor]:
        model = build(hidden_dropout=0.3, attention_dropout=0.3, **recompute)
        torch.manual_seed(seed)
        loss(model, inputs()).backward()
        return gradients(model)

    name = "decoder.layers.1.mlp.experts.fc1_weight"
    assert not torch.allclose(trained(5)[name], trained(6)[name])
    torch.testing.assert_close(trained(5, **full), trained(5), rtol=1e-5, atol=1e-7)


def test_the_device_state_that_recompute_keeps_is_the_hosts():
    state = random._get_cuda_rng_state()
    drawn = torch.rand(3)
    random._set_cuda_rng_state(state)
    assert torch.equal(torch.rand(3), drawn)
