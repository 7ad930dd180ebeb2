"""The shared gradient against plain autograd, whichever way recompute cuts the graph."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from megatron.core import tensor_parallel
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_tied.layers.accumulation import MarkUseSite, SharedGradient, UseSites, grouped_linear
from megatron_tied.layers.weight_gradient import Site

EXPERTS, WIDTH = 3, 16
COUNTS = [[3, 0, 5], [8, 0, 0], [0, 0, 8], [1, 1, 6], [0, 0, 0]]


def call(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """No recompute."""
    return function(x)


def reentrant(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Recompute that runs a backward pass of its own inside the outer one."""
    return checkpoint(function, x, use_reentrant=True)


def not_reentrant(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Recompute that only restores what the outer backward pass needs."""
    return checkpoint(function, x, use_reentrant=False)


def megatron(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Megatron-Core's own, which is reentrant."""
    return tensor_parallel.checkpoint(function, False, x)


MODES = [call, reentrant, not_reentrant, megatron]


def tensors(tokens: int = 8, out: int = WIDTH) -> tuple[Tensor, torch.nn.Parameter]:
    """Tokens [tokens, in] and weights [experts, out, in]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, WIDTH, generator=generator).requires_grad_()
    return x, torch.nn.Parameter(0.3 * torch.randn(EXPERTS, out, WIDTH, generator=generator))


def offsets(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def loop(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """What grouped_linear computes, as plain autograd sees it."""
    return torch.cat([tokens @ matrix.T for tokens, matrix in zip(x.split(counts), weight, strict=True)])


@pytest.fixture(params=["immediate", "fused", "mixed"])
def shared_by(request: pytest.FixtureRequest) -> Callable[[int], SharedGradient]:
    """What makes the gradient of a weight with so many use sites; some, all or none of them are kept for the last."""

    def make(use_sites: int) -> SharedGradient:
        kept = itertools.cycle({"immediate": [False], "fused": [True], "mixed": [False, True]}[request.param])
        shared = SharedGradient()
        shared.use_sites = use_sites
        shared.fuses = lambda tokens_per_expert: next(kept)
        return shared

    return make


def site(value: float) -> Site:
    """One whose part of the gradient is `value`, for a weight of one expert and one number."""
    return Site(torch.ones(1, 16), torch.full((1, 16), float(value)), torch.ones(1, dtype=torch.int32))


def test_the_sum_is_handed_on_once_and_the_next_pass_begins_anew(shared_by):
    shared = shared_by(3)
    told: list[bool] = []
    shared.on_change = told.append
    for _ in range(2):
        parts = [site(value) for value in (1, 10, 100)]
        assert shared.is_complete
        assert shared.add(parts[0]) is None
        assert shared.add(parts[1]) is None
        assert (shared.arrived, shared.is_complete) == (2, False)
        assert torch.equal(shared.add(parts[2]), torch.full((1, 16, 16), 111.0))
        assert shared.is_complete
    assert told == [False, False, True] * 2


def test_who_looks_on_is_told_every_part_and_changes_nothing(shared_by):
    shared = shared_by(3)
    told: list[tuple[int, float]] = []
    shared.on_add = lambda arrived, part: told.append((arrived, part.unique().item()))
    for _ in range(2):
        results = [shared.add(site(value)) for value in (1, 10, 100)]
        assert results[:2] == [None, None]
        assert torch.equal(results[2], torch.full((1, 16, 16), 111.0))
    assert told == [(0, 1), (1, 10), (2, 100)] * 2


def test_what_an_aborted_pass_left_is_forgotten(shared_by):
    shared = shared_by(2)
    shared.add(site(1))
    shared.reset()
    assert shared.is_complete
    assert shared.add(site(1)) is None
    assert torch.equal(shared.add(site(1)), torch.full((1, 16, 16), 2.0))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("out", [WIDTH, 24])
def test_one_use_equals_a_loop_over_experts(shared_by, counts, out):
    x, weight = tensors(sum(counts), out)
    y = grouped_linear(x, weight, offsets(counts), shared_by(1))
    expected = loop(x, weight, counts)
    torch.testing.assert_close(y, expected)
    upstream = torch.linspace(-1, 1, y.numel()).view(y.shape)
    found = torch.autograd.grad(y, (x, weight), upstream)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (x, weight), upstream))
    for expert, count in enumerate(counts):
        assert found[1][expert].any() == (count > 0)


def test_a_gradient_of_any_layout_is_taken(shared_by):
    x, weight = tensors(out=WIDTH)
    y = grouped_linear(x, weight, offsets(COUNTS[0]), shared_by(1))
    expected = torch.autograd.grad(loop(x, weight, COUNTS[0]).t().sum(), weight)
    torch.testing.assert_close(torch.autograd.grad(y.t().sum(), weight), expected)


def test_a_frozen_weight_lets_the_gradient_through_and_counts_nothing(shared_by):
    x, weight = tensors()
    weight.requires_grad_(False)
    shared = shared_by(2)
    grouped_linear(x, weight, offsets(COUNTS[0]), shared).square().sum().backward()
    expected = torch.autograd.grad(loop(x, weight, COUNTS[0]).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)
    assert weight.grad is None
    assert shared.is_complete


def test_tokens_without_a_gradient_still_give_the_weights_one(shared_by):
    x, weight = tensors()
    grouped_linear(x.detach(), weight, offsets(COUNTS[0]), shared_by(1)).square().sum().backward()
    expected = torch.autograd.grad(loop(x, weight, COUNTS[0]).square().sum(), weight)[0]
    torch.testing.assert_close(weight.grad, expected)


def test_without_grad_nothing_is_recorded(shared_by):
    x, weight = tensors()
    shared = shared_by(1)
    with torch.no_grad():
        y = grouped_linear(x, weight, offsets(COUNTS[0]), shared)
    assert not y.requires_grad
    torch.testing.assert_close(y, loop(x, weight, COUNTS[0]))


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("counts", [COUNTS[0], COUNTS[4]], ids=str)
def test_three_use_sites_equal_plain_autograd(shared_by, mode, counts):
    x, weight = tensors(sum(counts))
    shared = shared_by(3)
    ready: list[bool] = []
    fired: list[tuple[bool, bool]] = []
    shared.on_change = ready.append
    weight.register_post_accumulate_grad_hook(lambda p: fired.append((ready[-1], p.grad is not None)))

    def layer(x: Tensor) -> Tensor:
        return torch.tanh(grouped_linear(x, weight, offsets(counts), shared))

    hidden, expected = x, x
    for _ in range(3):
        hidden = mode(layer, hidden)
        expected = torch.tanh(loop(expected, weight, counts))
    expected = torch.autograd.grad(expected.square().sum(), (x, weight))
    hidden.square().sum().backward()

    torch.testing.assert_close((x.grad, weight.grad), expected)
    assert ready == [False, False, True]
    # Whoever acts on the hook may act only where it is ready, and there finds the sum.
    assert fired[-1] == (True, True)
    assert all(firing == (False, False) for firing in fired[:-1])
    assert len(fired) == (3 if mode in (reentrant, megatron) else 1)


def test_a_backward_pass_that_fails_midway_leaves_no_trace_after_reset(shared_by):
    x, weight = tensors()
    shared = shared_by(2)

    def two_layers(break_between: bool) -> Tensor:
        hidden = grouped_linear(x, weight, offsets(COUNTS[0]), shared).tanh()
        if break_between:
            hidden.register_hook(lambda gradient: 1 / 0)
        return grouped_linear(hidden, weight, offsets(COUNTS[0]), shared).square().sum()

    with pytest.raises(ZeroDivisionError):
        two_layers(break_between=True).backward()
    assert (shared.arrived, weight.grad) == (1, None)
    shared.reset()
    two_layers(break_between=False).backward()
    plain = loop(loop(x, weight, COUNTS[0]).tanh(), weight, COUNTS[0]).square().sum()
    torch.testing.assert_close(weight.grad, torch.autograd.grad(plain, weight)[0])


def test_gradients_of_two_micro_batches_add_up(shared_by):
    x, weight = tensors()
    shared = shared_by(2)

    def run(linear: Callable[[Tensor], Tensor], scale: float) -> Tensor:
        return linear(linear(scale * x).tanh()).square().sum()

    for scale in (1.0, 0.5):
        run(lambda x: grouped_linear(x, weight, offsets(COUNTS[0]), shared), scale).backward()
    plain = sum(run(lambda x: loop(x, weight, COUNTS[0]), scale) for scale in (1.0, 0.5))
    torch.testing.assert_close(weight.grad, torch.autograd.grad(plain, weight)[0])


class Experts(torch.nn.Module):
    """An expert module of another make: two weights, and a bias slot beside the output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.second = torch.nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.second(torch.tanh(self.first(x))), None


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
def test_marked_modules_are_ready_at_the_firing_that_has_the_whole_sum(mode):
    x, _ = tensors()
    owner = Experts()
    layers = [owner, Experts(), Experts()]
    sites = UseSites()
    sites.use_sites = 3
    ready: list[bool] = []
    sites.on_change = ready.append
    for layer in layers:
        layer.first.weight, layer.second.weight = owner.first.weight, owner.second.weight
        layer.register_forward_hook(MarkUseSite(sites))
    at_ready: dict[torch.nn.Parameter, list[Tensor]] = {weight: [] for weight in owner.parameters()}

    def keep(weight: torch.nn.Parameter) -> None:
        if ready[-1]:
            at_ready[weight].append(weight.grad.clone())

    for weight in owner.parameters():
        weight.register_post_accumulate_grad_hook(keep)

    hidden, expected = x, x
    for layer in layers:
        output, nothing = layer(expected)
        assert nothing is None
        expected = output.tanh()
        hidden = mode(lambda x, layer=layer: layer(x)[0].tanh(), hidden)
    # `expected` went through the marks as well: count its pass, then begin anew.
    plain = torch.autograd.grad(expected.square().sum(), tuple(owner.parameters()))
    assert ready == [False, False, True]
    hidden.square().sum().backward()
    assert ready == [False, False, True] * 2
    for weight, whole in zip(owner.parameters(), plain, strict=True):
        torch.testing.assert_close(weight.grad, whole)
        torch.testing.assert_close(at_ready[weight], [whole])
