"""Which experts do alike, and what is made of several: arithmetic against brute force."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch.nn.functional import silu

from megatron_tied.convert.matching import (
    Sample,
    assigned,
    expert_output,
    fitted,
    matching_costs,
    merged_expert,
    samples_of,
    telling_columns,
)

Experts = list[dict[str, torch.Tensor]]


def experts(count: int, seed: int) -> Experts:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate": (5, 6), "up": (5, 6), "down": (6, 5)}
    return [{kind: torch.randn(shape, generator=generator) for kind, shape in shapes.items()} for _ in range(count)]


def test_costs_are_those_of_a_loop() -> None:
    own, others = experts(4, 0), experts(4, 1)
    generator = torch.Generator().manual_seed(2)
    samples = [Sample(torch.randn(n, 6, generator=generator), torch.rand(n, generator=generator)) for n in (3, 1, 7, 2)]

    def output(matrices: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return matrices["down"] @ (silu(matrices["gate"] @ x) * (matrices["up"] @ x))

    found = matching_costs(own, others, samples, silu)
    for i, sample in enumerate(samples):
        for j in range(4):
            apart = whole = 0.0
            for x, w in zip(sample.states, sample.weights, strict=True):
                apart += w * (output(others[j], x) - output(own[i], x)).square().sum()
                whole += w * output(own[i], x).square().sum()
            torch.testing.assert_close(found[i, j], apart / whole)


def test_an_expert_that_gives_nothing_has_a_finite_cost() -> None:
    own = experts(2, 0)
    own[0]["down"] = torch.zeros(6, 5)
    samples = [Sample(torch.ones(3, 6), torch.ones(3))] * 2
    costs = matching_costs(own, experts(2, 1), samples, silu)
    assert costs.isfinite().all()
    assert costs[0].min() > 0


def test_assignments_are_the_best_there_are() -> None:
    for seed in range(20):
        costs = torch.rand(5, 5, generator=torch.Generator().manual_seed(seed))
        order = assigned(costs)
        assert sorted(order.tolist()) == list(range(5))
        best = min(sum(costs[row, place] for place, row in enumerate(rows)) for rows in permutations(range(5)))
        torch.testing.assert_close(costs[order, torch.arange(5)].sum(), best)


def test_experts_of_a_group_stay_together() -> None:
    """Else a router that chooses groups first would choose others."""

    def keeps_groups(rows: tuple[int, ...]) -> bool:
        return all(len({row // 2 for row in rows[start : start + 2]}) == 1 for start in (0, 2, 4))

    allowed = list(filter(keeps_groups, permutations(range(6))))
    assert len(allowed) == 48
    for seed in range(20):
        costs = torch.rand(6, 6, generator=torch.Generator().manual_seed(seed))
        order = assigned(costs, groups=3)
        assert keeps_groups(tuple(order.tolist()))
        best = min(sum(costs[row, place] for place, row in enumerate(rows)) for rows in allowed)
        torch.testing.assert_close(costs[order, torch.arange(6)].sum(), best)


def test_samples_are_what_is_sent_to_an_expert() -> None:
    states = torch.arange(60.0).view(20, 3)
    weights = torch.zeros(20, 3)
    weights[:8, 0], weights[4:6, 1] = 0.5, 0.25
    generator = torch.Generator().manual_seed(0)
    samples = samples_of(states, weights, weights > 0, 5, generator)
    first, second, none = samples
    # Each is held once, however many experts get it.
    assert len(samples.states.unique(dim=0)) == len(samples.states)
    assert len(samples.states) < sum(map(len, samples.rows))
    assert torch.equal(samples.moved([2, 0, 1])[1].states, first.states)
    assert len(first.states) == 5
    assert set(first.states[:, 0].tolist()) < set(states[:8, 0].tolist())
    assert set(first.weights.tolist()) == {0.25}
    assert sorted(second.states[:, 0].tolist()) == states[4:6, 0].tolist()
    assert set(second.weights.tolist()) == {0.0625}
    # Nothing is sent there: any states will do, and weigh the same, which is little.
    assert len(none.states) == 5
    assert len(set(none.weights.tolist())) == 1
    assert none.weights.max() < 1e-3 * second.weights.min()


def sample(count: int, seed: int, weight: float = 1.0) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    return Sample(torch.randn(count, 6, generator=generator), weight * torch.rand(count, generator=generator))


def errors(merged: dict[str, torch.Tensor], own: Experts, samples: list[Sample]) -> list[float]:
    """How far the merged expert is from each on its own sample, as matching measures it."""
    return [matching_costs([expert], [merged], [some], silu).item() for expert, some in zip(own, samples, strict=True)]


def whole_error(merged: dict[str, torch.Tensor], own: Experts, samples: list[Sample]) -> float:
    """The sum of w |merged(x) - own(x)|^2 over all samples."""
    return sum(
        (some.weights @ (expert_output(merged, some.states, silu) - expert_output(one, some.states, silu)) ** 2).sum()
        for one, some in zip(own, samples, strict=True)
    ).item()


def test_the_merge_of_the_same_experts_is_that_expert() -> None:
    (expert,) = experts(1, 0)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(1))
    # Its neurons in another order are the same expert.
    moved = {"gate": expert["gate"][order], "up": expert["up"][order], "down": expert["down"][:, order]}
    merged = merged_expert([expert, moved, expert], [sample(50, seed) for seed in (1, 2, 3)], silu)
    states = sample(100, 4).states
    torch.testing.assert_close(
        expert_output(merged, states, silu), expert_output(expert, states, silu), rtol=1e-4, atol=1e-4
    )


def test_a_merge_is_nearer_to_all_than_the_first_and_the_mean() -> None:
    for seed in range(5):
        own = experts(2, seed)
        samples = [sample(400, seed + 10), sample(400, seed + 20)]
        mean = {kind: (own[0][kind] + own[1][kind]) / 2 for kind in own[0]}
        others = [whole_error(other, own, samples) for other in (own[0], own[1], mean)]
        assert whole_error(merged_expert(own, samples, silu), own, samples) < 0.8 * min(others)


def test_in_a_merge_an_expert_weighs_its_use() -> None:
    own = experts(2, 0)
    for heavy in (0, 1):
        samples = [sample(400, number, 1.0 if number == heavy else 1e-4) for number in (0, 1)]
        found = errors(merged_expert(own, samples, silu), own, samples)
        assert found[heavy] < 0.02
        assert found[1 - heavy] > 0.3


def test_the_down_projection_is_a_weighted_least_squares_fit() -> None:
    """Against the normal equations, written out state by state, with a ridge as weak as to be nothing."""
    own, samples = experts(2, 0), [sample(2000, 1), sample(2000, 2)]
    merged = merged_expert(own, samples, silu)
    gram, right = torch.zeros(5, 5, dtype=torch.float64), torch.zeros(5, 6, dtype=torch.float64)
    for expert, some in zip(own, samples, strict=True):
        h = (silu(some.states @ merged["gate"].T) * (some.states @ merged["up"].T)).double()
        y = expert_output(expert, some.states, silu).double()
        gram += (some.weights.double()[:, None] * h).T @ h
        right += (some.weights.double()[:, None] * h).T @ y
    torch.testing.assert_close(merged["down"].double(), torch.linalg.solve(gram, right).T, rtol=2e-3, atol=2e-3)
    neurons = {tuple(row.tolist()) for expert in own for row in torch.cat([expert["gate"], expert["up"]], 1)}
    assert {tuple(row.tolist()) for row in torch.cat([merged["gate"], merged["up"]], 1)} < neurons


def test_columns_that_repeat_others_are_left_out() -> None:
    columns = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 1.0, 5.0, 3.0])
    matrix = torch.cat([columns, 2 * columns[:, :1], columns[:, :1] + columns[:, 2:3]], dim=1)
    found = telling_columns(matrix, 4)
    assert torch.linalg.matrix_rank(matrix[:, found]) == 4
    assert found.tolist() == sorted(found.tolist())
    # More than there is to tell: the largest of the rest.
    assert set(telling_columns(columns[:, [0, 0, 1, 1]], 3).tolist()) > {0, 1}
    assert len(telling_columns(torch.zeros(3, 4), 2)) == 2


@pytest.mark.parametrize("rows", [1, 4, 40])
def test_a_fit_of_few_or_no_states_is_finite(rows: int) -> None:
    inputs = torch.randn(rows, 8, generator=torch.Generator().manual_seed(0))
    assert fitted(inputs, inputs[:, :2]).isfinite().all()
    assert not fitted(torch.zeros(rows, 8), torch.ones(rows, 2)).any()
