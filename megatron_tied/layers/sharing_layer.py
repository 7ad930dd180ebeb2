"""`SharingLayer`: a transformer layer that has more than its routed experts in common with its tie group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_tied.layers.banks import ExpertBanks, describe, is_tied, tie

_PARTS = {"experts_attention": ("self_attention",), "all": ("self_attention", "mlp.router")}


class SharingLayer(TransformerLayer):
    """Megatron-Core's layer with the attention of its bank's owner and, with `tie.share: all`, its router's weights.

    Modules of its own hold the owner's Parameters, as `ExpertBanks` has it for experts: so the losses and the load that
    a router counts, and its bias, are of one layer. Its experts are a `TiedMoELayer`'s. Built by a `ModuleSpec` whose
    params hold `banks` and `layer_index`.
    """

    def __init__(self, *args: Any, banks: ExpertBanks, layer_index: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.topology = banks.topology
        self.bank = banks.topology.bank(layer_index)
        # In tuples, so that the owner's modules are not registered a second time under this layer.
        parts = _PARTS[banks.topology.tie.share]
        self._shared = tuple((part, banks.attach(layer_index, self.get_submodule(part), part)) for part in parts)

    @property
    def is_owner(self) -> bool:
        """True for the first layer of its bank, under which the weights are listed and optimised."""
        return all(own is owner for own, owner in self.shared())

    def shared(self) -> Iterator[tuple[torch.nn.Module, torch.nn.Module]]:
        """Each module whose weights are shared, with the owner's."""
        for part, owner in self._shared:
            yield self.get_submodule(part), owner

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> SharingLayer:
        # As in TiedMoELayer.
        super()._apply(fn, recurse)
        for own, owner in self.shared():
            tie(own, owner)
        return self

    def check_tied(self) -> None:
        """Raise `RuntimeError` if something has replaced the shared Parameters by copies."""
        if not all(is_tied(own, owner) for own, owner in self.shared()):
            raise RuntimeError(
                f"layer {self.layer_number - 1} no longer shares the attention or router of the layers of "
                f"{describe(self.bank)}: something replaced its Parameters. Build the model again."
            )


def sharing_layers(model: torch.nn.Module) -> Iterator[SharingLayer]:
    """The model's `SharingLayer`s in the order they are registered."""
    return (module for module in model.modules() if isinstance(module, SharingLayer))
