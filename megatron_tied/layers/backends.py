"""The expert backends a bank can be built from, and where each keeps an expert's matrices."""

from __future__ import annotations

from collections.abc import Iterator
from functools import singledispatch

import torch
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.moe.experts import HAVE_TE, SequentialMLP, TEGroupedMLP

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.layers.grouped_experts import GroupedExperts
from megatron_tied.platform.specs import Spec, experts_of

BACKENDS = ("grouped", "sequential", "te")


def experts_spec(backend: str) -> Spec:
    """The spec of the routed experts: `grouped` (ours), `sequential` or `te` (Megatron-Core's).

    Raises `ConfigError` for another name, or for `te` without Transformer Engine.
    """
    if backend == "grouped":
        return GroupedExperts
    if backend == "sequential":
        return experts_of(LocalSpecProvider(), grouped=False)
    if backend == "te" and HAVE_TE:
        return experts_of(TESpecProvider(), grouped=True)
    if backend == "te":
        raise ConfigError(Problem("model.expert_backend", "te", "needs Transformer Engine, which is not installed"))
    raise ConfigError(Problem("model.expert_backend", backend, f"must be one of {', '.join(BACKENDS)}"))


@singledispatch
def expert_matrices(experts: torch.nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Each local expert's matrices as views: `gate` [ffn, hidden] (if gated), `up` [ffn, hidden], `down` [hidden, ffn].

    Writing into a view writes into the bank. Raises `TypeError` for an expert module of an unknown kind.
    """
    raise TypeError(f"no expert backend is known for {type(experts).__name__}")


def has_known_matrices(experts: torch.nn.Module) -> bool:
    """Whether `expert_matrices` knows this kind of expert module."""
    return expert_matrices.dispatch(type(experts)) is not expert_matrices.dispatch(object)


def _split(fc1: torch.Tensor, fc2: torch.Tensor, gated: bool) -> dict[str, torch.Tensor]:
    if not gated:
        return {"up": fc1, "down": fc2}
    gate, up = fc1.chunk(2, dim=0)
    return {"gate": gate, "up": up, "down": fc2}


@expert_matrices.register
def _(experts: GroupedExperts) -> Iterator[dict[str, torch.Tensor]]:
    gated = experts.config.gated_linear_unit
    for fc1, fc2 in zip(experts.fc1_weight.detach(), experts.fc2_weight.detach(), strict=True):
        yield _split(fc1, fc2, gated)


@expert_matrices.register
def _(experts: SequentialMLP) -> Iterator[dict[str, torch.Tensor]]:
    gated = experts.config.gated_linear_unit
    for expert in experts.local_experts:
        yield _split(expert.linear_fc1.weight.detach(), expert.linear_fc2.weight.detach(), gated)


@expert_matrices.register
def _(experts: TEGroupedMLP) -> Iterator[dict[str, torch.Tensor]]:
    gated = experts.config.gated_linear_unit
    for index in range(experts.num_local_experts):
        fc1 = getattr(experts.linear_fc1, f"weight{index}").detach()
        fc2 = getattr(experts.linear_fc2, f"weight{index}").detach()
        yield _split(fc1, fc2, gated)
