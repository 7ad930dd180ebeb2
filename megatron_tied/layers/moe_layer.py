"""`TiedMoELayer`: Megatron-Core's MoE layer whose routed experts belong to an expert bank."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_tied.layers.banks import ExpertBanks, describe, is_tied, tie
from megatron_tied.layers.initialization import initialize_experts
from megatron_tied.topology import Bank


class TiedMoELayer(MoELayer):
    """An MoE layer with its own router, dispatcher and shared experts, and the routed experts of its bank.

    Forward as upstream: hidden states [sequence, batch, hidden] -> (same shape, None). `layer_index` counts the
    decoder's layers from 0, dense ones included. Tied experts may be more than the untied ones (width expansion):
    router and dispatcher follow the bank. Built by a `ModuleSpec` whose params hold `banks` and `layer_index`;
    see `megatron_tied.tied_decoder_block_spec`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        banks: ExpertBanks,
        layer_index: int,
        **kwargs,
    ):
        layer_config = copy.copy(config)
        layer_config.num_moe_experts = banks.topology.num_experts(layer_index, config.num_moe_experts)
        super().__init__(layer_config, submodules, layer_number, pg_collection, **kwargs)
        self.layer_index = layer_index
        self.topology = banks.topology
        # In a tuple, so that the owner's module is not registered a second time under this layer.
        self._owner = (banks.attach(layer_index, self.experts),)
        if self.is_owner and config.perform_initialization:
            self.initialize_experts(torch.initial_seed())

    @property
    def bank(self) -> Bank:
        """The bank of this layer."""
        return self.topology.bank(self.layer_index)

    @property
    def is_owner(self) -> bool:
        """True for the first layer of its bank, where the weights are listed, saved and optimised."""
        return self.topology.is_owner(self.layer_index)

    def postprocess(self, output: torch.Tensor, shared_expert_output: torch.Tensor | None) -> torch.Tensor:
        """As upstream; then the dispatcher forgets the probabilities it has used.

        They hold the graph, and with recompute, whose graphs begin at copies of a layer's input, every layer's input
        and its gradient until the next forward.
        """
        output = super().postprocess(output, shared_expert_output)
        for name in ("probs", "local_probs"):
            if hasattr(self.token_dispatcher, name):
                setattr(self.token_dispatcher, name, None)
        return output

    def initialize_experts(self, seed: int) -> None:
        """Fill the bank's local experts by their global index: the same values at any expert parallel size."""
        initialize_experts(
            self.experts,
            self.config,
            seed=seed,
            bank=self.bank.index,
            first_expert=self.local_expert_indices[0],
        )

    def _apply(self, fn: Callable, recurse: bool = True) -> TiedMoELayer:
        # Leaving the meta device (or any conversion that makes new Parameters) would part follower and owner.
        super()._apply(fn, recurse)
        tie(self.experts, self._owner[0])
        return self

    def check_tied(self) -> None:
        """Raise `RuntimeError` if something has replaced this layer's expert Parameters by copies."""
        if not is_tied(self.experts, self._owner[0]):
            raise RuntimeError(
                f"layer {self.layer_index} no longer shares the weights of {describe(self.bank)}: something replaced "
                f"its expert Parameters. Build the model again, or assign the owner's Parameters back."
            )


def tied_layers(model: torch.nn.Module) -> Iterator[TiedMoELayer]:
    """The model's `TiedMoELayer`s in the order they are registered."""
    return (module for module in model.modules() if isinstance(module, TiedMoELayer))
