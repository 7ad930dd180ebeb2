"""Another topology over the weights of a source: layers tied that had experts of their own, or untied."""

from __future__ import annotations

from typing import Protocol

import torch

from megatron_tied.convert.sources import WeightSource
from megatron_tied.convert.tensors import expert_shape
from megatron_tied.errors import ConfigError, Problem
from megatron_tied.topology import TieTopology

_ROUTER_ENDINGS = (".mlp.router.weight", ".mlp.router.expert_bias")


class Merge(Protocol):
    """How the experts of several layers become those of one bank."""

    def permutation(self, layer: int) -> torch.Tensor | None:
        """Which expert of `layer` comes to each place of its bank [experts]; None: each to its own.

        The router's rows and bias move with them, so that the layer alone computes what it did.
        """

    def weights(self, layer: int) -> torch.Tensor:
        """What `layer` weighs at each place of its bank [experts], >= 0 (after the permutation)."""


class OwnerMerge:
    """A bank has the experts of its first layer."""

    def __init__(self, topology: TieTopology, num_experts: int):
        self._topology = topology
        self._num_experts = num_experts

    def permutation(self, layer: int) -> torch.Tensor | None:
        """See `Merge`."""
        return None

    def weights(self, layer: int) -> torch.Tensor:
        """See `Merge`."""
        return torch.full((self._num_experts,), float(self._topology.is_owner(layer)))


class AverageMerge:
    """A bank has the mean of its layers' experts, place by place."""

    def __init__(self, num_experts: int):
        self._num_experts = num_experts

    def permutation(self, layer: int) -> torch.Tensor | None:
        """See `Merge`."""
        return None

    def weights(self, layer: int) -> torch.Tensor:
        """See `Merge`."""
        return torch.ones(self._num_experts)


class RetiedSource:
    """The weights of `base` as a model of another topology has them. Untying copies a bank to each of its layers.

    Raises `ConfigError` where the two topologies' layers have other numbers of experts.
    """

    def __init__(self, base: WeightSource, topology: TieTopology, merge: Merge):
        self.base = base
        self.config = base.config
        self.topology = topology
        self.merge = merge
        experts = self.config.num_moe_experts
        for layer in topology.moe_layers:
            had, has = base.topology.num_experts(layer, experts), topology.num_experts(layer, experts)
            if had != has:
                valid = f"must be {had} in layer {layer}, not {has}: a model with wider tied layers keeps its banks"
                raise ConfigError(Problem("tie.num_tied_experts", topology.tie.num_tied_experts, valid))

    def names(self) -> list[str]:
        """See `WeightSource`."""
        return self.base.names()

    def dtype(self, name: str) -> torch.dtype:
        """See `WeightSource`."""
        return self.base.dtype(name)

    def read(self, name: str) -> torch.Tensor:
        """See `WeightSource`."""
        tensor = self.base.read(name)
        if not name.endswith(_ROUTER_ENDINGS):
            return tensor
        order = self._permutation(int(name.split(".")[2]))
        return tensor if order is None else tensor[order]

    def expert_dtype(self, layer: int, kind: str) -> torch.dtype:
        """See `WeightSource`."""
        return self.base.expert_dtype(self.topology.bank(layer).owner, kind)

    def read_experts(self, layer: int, kind: str) -> torch.Tensor:
        """See `WeightSource`. Means are taken in float32 and rounded once."""
        layers = self.topology.bank(layer).layers
        contributing = [user for user in layers if self._is_merged(layers) and self.merge.weights(user).any()]
        if len(contributing) < 2:
            return self._own_experts(contributing[0] if contributing else layers[0], kind)
        total = torch.zeros(expert_shape(self.config, self.topology, layer, kind))
        weight = torch.zeros(total.shape[0])
        for user in contributing:
            own = self.merge.weights(user).float()
            for place, matrix in enumerate(self._own_experts(user, kind)):
                # Expert by expert: a float32 copy of a whole bf16 bank would be twice its size.
                total[place].add_(matrix.float(), alpha=own[place].item())
            weight += own
        if not weight.all():
            raise ValueError(f"bank of layer {layers[0]}: no layer has a weight for places {(weight == 0).nonzero()}")
        return total.div_(weight[:, None, None]).to(self.expert_dtype(layer, kind))

    def _is_merged(self, layers: tuple[int, ...]) -> bool:
        """Whether these layers of one bank bring different experts, or in another order."""
        base = self.base.topology.bank_of_layer
        return len({base[layer] for layer in layers}) > 1 or any(self._permutation(user) is not None for user in layers)

    def _permutation(self, layer: int) -> torch.Tensor | None:
        return self.merge.permutation(layer) if self.topology.bank(layer).is_tied else None

    def _own_experts(self, layer: int, kind: str) -> torch.Tensor:
        experts, order = self.base.read_experts(layer, kind), self._permutation(layer)
        return experts if order is None else experts[order]
