"""Another topology over the weights of a source: layers tied that had experts of their own, or untied."""

from __future__ import annotations

from typing import Protocol

import torch

from megatron_tied.convert.precision import common_dtype
from megatron_tied.convert.sources import WeightSource
from megatron_tied.convert.tensors import expert_shape
from megatron_tied.errors import ConfigError, Problem
from megatron_tied.topology import Bank, TieTopology

_ROUTER_ENDINGS = (".mlp.router.weight", ".mlp.router.expert_bias")


def merges(base: WeightSource, bank: Bank) -> bool:
    """Whether the layers of `bank` bring different experts from `base`."""
    return len({base.topology.bank_of_layer[layer] for layer in bank.layers}) > 1


def merged_dtype(base: WeightSource, bank: Bank, kind: str) -> torch.dtype:
    """In which precision a bank is stored, which rounds none of its layers' experts."""
    return common_dtype(base.expert_dtype(layer, kind) for layer in bank.layers)


class Merge(Protocol):
    """How the experts of several layers become those of one bank."""

    def permutation(self, layer: int) -> torch.Tensor | None:
        """Which expert of `layer` comes to each place of its bank [experts]; None: each to its own.

        The router's rows and bias move with them, so that the layer alone computes what it did.
        """

    def experts(self, base: WeightSource, bank: Bank, kind: str) -> torch.Tensor:
        """One kind of the matrices of `bank`, whose layers have different experts in `base`."""


class OwnerMerge:
    """A bank has the experts of its first layer."""

    def permutation(self, layer: int) -> torch.Tensor | None:
        """See `Merge`."""
        return None

    def experts(self, base: WeightSource, bank: Bank, kind: str) -> torch.Tensor:
        """See `Merge`."""
        return base.read_experts(bank.owner, kind)


class AverageMerge:
    """A bank has the mean of its layers' experts, place by place, taken in float32."""

    def permutation(self, layer: int) -> torch.Tensor | None:
        """See `Merge`."""
        return None

    def experts(self, base: WeightSource, bank: Bank, kind: str) -> torch.Tensor:
        """See `Merge`."""
        total = torch.zeros(expert_shape(base.config, base.topology, bank.owner, kind))
        for layer in bank.layers:
            for place, matrix in enumerate(base.read_experts(layer, kind)):
                # Expert by expert: a float32 copy of a whole bf16 bank would be twice its size.
                total[place] += matrix
        return total.div_(bank.size)


def _check_expert_counts(base: WeightSource, topology: TieTopology) -> None:
    """Raise `ConfigError` unless every layer has as many experts in `topology` as in `base`."""
    for layer in topology.moe_layers:
        had, has = (which.num_experts(layer, base.config.num_moe_experts) for which in (base.topology, topology))
        if had != has:
            valid = f"must be {had} in layer {layer}, not {has}: a model with wider tied layers keeps its banks"
            raise ConfigError(Problem("tie.num_tied_experts", topology.tie.num_tied_experts, valid))


class RetiedSource:
    """The weights of `base` as a model of another topology has them. Untying copies a bank to each of its layers.

    Raises `ConfigError` where the two topologies' layers have other numbers of experts.
    """

    def __init__(self, base: WeightSource, topology: TieTopology, merge: Merge):
        self.base = base
        self.config = base.config
        self.vocab_size = base.vocab_size
        self.topology = topology
        self.merge = merge
        _check_expert_counts(base, topology)

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
        return merged_dtype(self.base, self.topology.bank(layer), kind)

    def read_experts(self, layer: int, kind: str) -> torch.Tensor:
        """See `WeightSource`. What is merged is rounded once."""
        bank = self.topology.bank(layer)
        if not merges(self.base, bank):
            return self.base.read_experts(bank.owner, kind).to(self.expert_dtype(layer, kind))
        return self.merge.experts(self.base, bank, kind).to(self.expert_dtype(layer, kind))

    def _permutation(self, layer: int) -> torch.Tensor | None:
        bank = self.topology.bank(layer)
        return self.merge.permutation(layer) if merges(self.base, bank) else None
