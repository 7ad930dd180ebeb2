"""`TiedMoELayer`: Megatron-Core's MoE layer whose routed experts belong to an expert bank."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.layers.backends import has_known_matrices
from megatron_tied.layers.banks import ExpertBanks, describe, is_tied, tie
from megatron_tied.layers.dispatcher import AllToAllDispatcher
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
        **kwargs: Any,
    ):
        layer_config = copy.copy(config)
        layer_config.num_moe_experts = banks.topology.num_experts(layer_index, config.num_moe_experts)
        super().__init__(layer_config, submodules, layer_number, pg_collection, **kwargs)
        self._join(banks, layer_index)
        # Experts of another kind, such as Megatron-Core's legacy grouped ones, have filled themselves.
        if self.is_owner and config.perform_initialization and has_known_matrices(self.experts):
            self.initialize_experts(torch.initial_seed())

    @classmethod
    def adopt(cls, layer: MoELayer, banks: ExpertBanks, layer_index: int) -> TiedMoELayer:
        """Make a Megatron-Core MoE layer that is already built one of ours, in place; an owner keeps its weights.

        Raises `ConfigError` for another class than `MoELayer`, and for tied experts that differ in number.
        """
        if type(layer) is not MoELayer:
            valid = "must be megatron.core's MoELayer itself; build the model with tied_decoder_block_spec"
            raise ConfigError(Problem(f"decoder.layers[{layer_index}].mlp", type(layer).__name__, valid))
        if (wanted := banks.topology.num_experts(layer_index, own := layer.config.num_moe_experts)) != own:
            valid = f"must be {own}, as the layers of the model have that is already built"
            raise ConfigError(Problem("tie.num_tied_experts", wanted, valid))
        layer.__class__ = cls
        adopted: TiedMoELayer = layer
        adopted._join(banks, layer_index)
        return adopted

    def _join(self, banks: ExpertBanks, layer_index: int) -> None:
        self.layer_index = layer_index
        self.topology = banks.topology
        # In a tuple, so that the owner's module is not registered a second time under this layer.
        self._owner = (banks.attach(layer_index, self.experts),)
        AllToAllDispatcher.adopt(self.token_dispatcher)

    @property
    def bank(self) -> Bank:
        """The bank of this layer."""
        return self.topology.bank(self.layer_index)

    @property
    def is_owner(self) -> bool:
        """True for the first layer of its bank in this model chunk: the weights are listed and optimised there."""
        return self._owner[0] is self.experts

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

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> TiedMoELayer:
        # Leaving the meta device (or any conversion that makes new Parameters) would part follower and owner.
        super()._apply(fn, recurse)
        tie(self.experts, self._owner[0])
        return self

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """As upstream, a bank's weights under its owner only; a distributed checkpoint holds every tensor once."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.is_owner:
            return state
        # Transformer Engine's extra state, such as fp8 scales, is each layer's own.
        return {
            name: value
            for name, value in state.items()
            if not name.startswith(f"{prefix}experts.") or name.endswith("_extra_state")
        }

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # What was saved once, under the owner, is loaded once: by now the owner has it, and the follower with it.
        if not self.is_owner:
            for name, value in self._owner[0].state_dict().items():
                state_dict.setdefault(f"{prefix}experts.{name}", value)
        super()._load_from_state_dict(state_dict, prefix, *args)

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
