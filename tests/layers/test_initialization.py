"""Initial experts: a function of seed, bank, global index and matrix, and of nothing else."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from megatron_tied.layers.backends import expert_matrices, experts_spec
from megatron_tied.layers.initialization import initialize_experts, initialize_matrix
from megatron_tied.models.gpt import transformer_config
from tests.tiny_model import model_config

pytestmark = pytest.mark.usefixtures("one_process")

EXPERTS = 8


def experts(
    *, backend: str = "grouped", local: int = EXPERTS, first: int = 0, seed: int = 1, bank: int = 0, precision="fp32"
) -> list[dict[str, Tensor]]:
    """The initial matrices of the `local` experts that a rank holds."""
    config = transformer_config(model_config(), precision=precision)
    module = build_module(experts_spec(backend), local, config, pg_collection=get_default_pg_collection())
    initialize_experts(module, config, seed=seed, bank=bank, first_expert=first)
    return list(expert_matrices(module))


def flat(*shards: list[dict[str, Tensor]]) -> list[Tensor]:
    return [matrix for shard in shards for matrices in shard for matrix in matrices.values()]


@pytest.mark.parametrize("ep", [2, 4, 8])
@pytest.mark.parametrize("backend", ["grouped", "sequential"])
def test_shards_of_any_size_and_backend_hold_the_same_experts(backend, ep):
    local = EXPERTS // ep
    shards = [experts(backend=backend, local=local, first=rank * local) for rank in range(ep)]
    assert all(torch.equal(a, b) for a, b in zip(flat(*shards), flat(experts()), strict=True))


def test_every_matrix_is_another_draw():
    everything = flat(experts(), experts(bank=1), experts(seed=2))
    assert len(everything) == 3 * EXPERTS * 3
    for a, b in itertools.combinations(everything, 2):
        assert a.shape != b.shape or not torch.equal(a, b)


def test_values_follow_the_configs_init_methods():
    config = transformer_config(model_config())
    matrices = experts()
    for kind in ("gate", "up"):
        values = torch.stack([m[kind] for m in matrices])
        assert values.std().item() == pytest.approx(0.1, rel=0.05)
        assert abs(values.mean().item()) < 0.01
    down = torch.stack([m["down"] for m in matrices])
    assert down.std().item() == pytest.approx(0.1 / math.sqrt(2 * config.num_layers), rel=0.05)


def test_half_precision_rounds_the_same_draw():
    for half, full in zip(flat(experts(precision="bf16")), flat(experts()), strict=True):
        assert half.dtype == torch.bfloat16
        assert torch.equal(half, full.bfloat16())


def test_nobody_elses_random_numbers_change():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = flat(experts())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    assert all(torch.equal(a, b) for a, b in zip(flat(experts()), first, strict=True))


def test_an_error_while_drawing_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        initialize_matrix(torch.empty(2, 2), lambda drawn: (drawn.normal_(), 1 / 0), seed=1, name="x")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_matrix_is_filled_in_place_from_its_own_stream():
    def fill(seed: int, name: str) -> Tensor:
        matrix = torch.nn.Parameter(torch.zeros(3, 4))
        initialize_matrix(matrix, torch.nn.init.normal_, seed, name)
        assert matrix.requires_grad
        assert matrix.grad_fn is None
        return matrix.detach()

    assert torch.equal(fill(1, "a"), fill(1, "a"))
    others = [fill(1, "b"), fill(2, "a"), fill(12, "a"), fill(1, "2a")]
    for a, b in itertools.combinations([fill(1, "a"), *others], 2):
        assert not torch.equal(a, b)
