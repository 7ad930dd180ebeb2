"""Which experts of two layers do alike, and one expert that does nearly what several do: arithmetic on tensors alone.

Experts i of a layer and j of another are as far apart as their outputs are on what the layer sends to i.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from scipy.linalg import qr
from scipy.optimize import linear_sum_assignment

from megatron_tied.convert.tensors import KINDS

Activation = Callable[[torch.Tensor], torch.Tensor]
# `gate` and `up` [ffn, hidden], `down` [hidden, ffn].
Matrices = dict[str, torch.Tensor]

# What is sent to no expert tells something of it, but as good as nothing beside what is sent to another.
_UNSENT_WEIGHT = 1e-6
# Shares of the mean square of a neuron: by how much a fit is drawn to what it begins with.
_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# Of the states, one in so many is for choosing between them.
_HELD_OUT = 5


class Sample(NamedTuple):
    """States that are sent to one expert [n, hidden], and what each weighs [n]: its squared combine weight."""

    states: torch.Tensor
    weights: torch.Tensor

    def first(self, count: int) -> Sample:
        """At most `count` of them."""
        return Sample(self.states[:count], self.weights[:count])


@dataclass(frozen=True)
class Samples:
    """A sample for each expert of a layer. A state that is sent to several experts is held once."""

    states: torch.Tensor
    rows: list[torch.Tensor]
    weights: list[torch.Tensor]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Sample]:
        return (self[expert] for expert in range(len(self)))

    def __getitem__(self, expert: int) -> Sample:
        return Sample(self.states[self.rows[expert]], self.weights[expert])

    def moved(self, order: Sequence[int]) -> Samples:
        """Those of the experts in another `order`."""
        return Samples(self.states, [self.rows[expert] for expert in order], [self.weights[expert] for expert in order])


def samples_of(
    states: torch.Tensor,
    combine_weights: torch.Tensor,
    routing_map: torch.Tensor,
    limit: int,
    generator: torch.Generator,
) -> Samples:
    """For each expert at most `limit` of the `states` [tokens, hidden] that are sent to it, chosen at random.

    combine_weights, routing_map: [tokens, experts]. An expert that gets none is told by any states, weighing the same.
    """
    chosen, weights = [], []
    for expert in range(routing_map.shape[1]):
        sent = routing_map[:, expert].nonzero().flatten()
        reached = len(sent) > 0
        if not reached:
            sent = torch.arange(len(states), device=states.device)
        chosen.append(sent[torch.randperm(len(sent), generator=generator)[:limit].to(sent.device)])
        weight = combine_weights[chosen[-1], expert].float().square()
        weights.append(weight if reached else torch.full_like(weight, _UNSENT_WEIGHT))
    held, places = torch.cat(chosen).unique(return_inverse=True)
    return Samples(states[held].float(), list(places.split([len(rows) for rows in chosen])), weights)


def matching_costs(
    own: Sequence[Matrices], others: Sequence[Matrices], samples: Sequence[Sample], activation: Activation
) -> torch.Tensor:
    """[own, others]: the sum of w |other(x) - own(x)|^2 over the sample (x, w) of `own`, over that of w |own(x)|^2."""
    sizes = [len(sample.weights) for sample in samples]
    states = torch.cat([sample.states for sample in samples])
    weights = torch.cat([sample.weights for sample in samples])
    outputs = torch.cat(
        [expert_output(matrices, sample.states, activation) for matrices, sample in zip(own, samples, strict=True)]
    )

    def weighted(difference: torch.Tensor) -> torch.Tensor:
        parts = (weights * difference.square().sum(-1)).split(sizes)
        return torch.stack([part.sum() for part in parts]).cpu()

    whole = weighted(outputs)
    # An expert that gives nothing is as far from another as that gives much.
    whole = torch.where(whole == 0, 1.0, whole)
    columns = [weighted(expert_output(matrices, states, activation) - outputs) / whole for matrices in others]
    return torch.stack(columns, dim=1)


def assigned(costs: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """The bijection of least cost: for each place, which is a column, the row that comes there.

    With several `groups` of neighbouring experts, among which a router chooses before it chooses experts, those of a
    group stay together.
    """
    if groups == 1:
        rows, columns = (torch.from_numpy(ends) for ends in linear_sum_assignment(costs.numpy()))
        order = torch.empty_like(rows)
        order[columns] = rows
        return order
    size = len(costs) // groups
    blocks = costs.view(groups, size, groups, size).transpose(1, 2)
    within = torch.stack([torch.stack([assigned(block) for block in row]) for row in blocks])
    group_costs = blocks.gather(2, within[:, :, None]).sum((2, 3))
    group_order = assigned(group_costs)
    moved = within[group_order, torch.arange(groups)] + size * group_order[:, None]
    return moved.flatten()


def expert_output(matrices: Matrices, states: torch.Tensor, activation: Activation) -> torch.Tensor:
    """What a gated expert makes of `states` [n, hidden], in float32."""
    return _neurons(matrices, states, activation) @ matrices["down"].float().T


def merged_expert(experts: Sequence[Matrices], samples: Sequence[Sample], activation: Activation) -> Matrices:
    """One expert, as wide as each of `experts`, whose outputs on each one's sample are near that one's; in float32.

    Of the neurons of all it has those that do most and are not told by others. Its down projection then is fitted to
    the outputs of all by least squares, in which a state weighs its squared combine weight: an expert weighs its use.
    A mean of weights, in which unrelated neurons cancel, comes nowhere near (examples/benchmarks/tying_trained.md).
    """
    width = experts[0]["down"].shape[1]
    together = {
        kind: torch.cat([matrices[kind].float() for matrices in experts], dim=1 if kind == "down" else 0)
        for kind in KINDS
    }
    outputs = [
        expert_output(expert, sample.states, activation) for expert, sample in zip(experts, samples, strict=True)
    ]
    root = torch.cat([sample.weights for sample in samples]).sqrt()[:, None]
    neurons = root * _neurons(together, torch.cat([sample.states for sample in samples]), activation)
    # What a neuron does is what it gives on the sample of its own expert; what it says, on all.
    own = zip(neurons.split([len(sample.weights) for sample in samples]), range(0, len(neurons.T), width), strict=True)
    sizes = torch.cat([rows[:, first : first + width].norm(dim=0) for rows, first in own]) * together["down"].norm(
        dim=0
    )
    chosen = telling_columns(torch.nn.functional.normalize(neurons, dim=0) * sizes, width)
    gate, up, down = together["gate"][chosen], together["up"][chosen], together["down"][:, chosen]
    left = root * torch.cat(outputs) - neurons[:, chosen] @ down.T
    return {"gate": gate, "up": up, "down": down + fitted(neurons[:, chosen], left).T}


def telling_columns(matrix: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` columns of `matrix` [n, columns] by which the others can be told best, in their order.

    Each in turn is the one of which least can be told by those before it (QR with column pivoting); where nothing is
    left to be told, the largest.
    """
    triangle, pivots = qr(matrix.cpu().numpy(), mode="r", pivoting=True)
    diagonal = abs(triangle.diagonal())
    rank = int((diagonal > 1e-6 * diagonal[0]).sum())
    chosen = torch.zeros(matrix.shape[1], dtype=torch.bool)
    chosen[torch.from_numpy(pivots[: min(rank, count)])] = True
    sizes = matrix.norm(dim=0).cpu().masked_fill(chosen, -1.0)
    chosen[sizes.topk(count - int(chosen.sum())).indices] = True
    return chosen.nonzero().flatten().to(matrix.device)


def fitted(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """X [in, out] with inputs [n, in] X near outputs [n, out], by ridge regression as strong as unseen rows want it."""
    held_out = torch.arange(len(inputs), device=inputs.device) % _HELD_OUT == 0

    def error(strength: float) -> float:
        found = _ridge(inputs[~held_out], outputs[~held_out], strength)
        return (inputs[held_out] @ found - outputs[held_out]).square().sum().item()

    return _ridge(inputs, outputs, min(_STRENGTHS, key=error))


def _ridge(inputs: torch.Tensor, outputs: torch.Tensor, strength: float) -> torch.Tensor:
    inputs, outputs = inputs.double(), outputs.double()
    gram = inputs.T @ inputs
    # At least something: inputs may be zero.
    gram.diagonal().add_(strength * gram.diagonal().mean().clamp(min=1e-30))
    found: torch.Tensor = torch.linalg.solve(gram, inputs.T @ outputs)
    return found.float()


def _neurons(matrices: Matrices, states: torch.Tensor, activation: Activation) -> torch.Tensor:
    gate, up = matrices["gate"].float(), matrices["up"].float()
    return activation(states @ gate.T) * (states @ up.T)
