"""`tie_experts`: from the model chunks of a pipeline stage, as Megatron-LM builds them, to chunks with expert banks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.layers.banks import ExpertBanks, leave_gradients_to_autograd
from megatron_tied.layers.moe_layer import TiedMoELayer, tied_layers
from megatron_tied.megatron_lm.copies import place_copies
from megatron_tied.topology import TieTopology

_ALWAYS_ADDS = "disable_parameter_transpose_cache"  # of Transformer Engine's linear layers


def tie_experts(model_chunks: list[MegatronModule], topology: TieTopology) -> list[MegatronModule]:
    """Tie the experts of this pipeline stage's model chunks, in place; returns `model_chunks`.

    A pre-wrap hook: to be called with all chunks of the stage, on every rank, after they are built and before they
    are cast, wrapped in DDP or given to an optimizer. Layers that are `MoELayer` become `TiedMoELayer` and give up
    their experts for those of their bank's first layer; layers built by `tied_decoder_block_spec` are tied already.
    Where the chunks of a pipeline share a bank (`tie.pipeline: allreduce`), `sum_bank_copies` must follow Megatron's
    `finalize_model_grads`. Raises `ConfigError` if the topology does not fit the model or shares more than experts,
    and, with `tie.pipeline: align`, if a tie group lies in several chunks.
    """
    if topology.shares_more:
        raise ConfigError(Problem("tie.share", topology.tie.share, "must be experts: nothing else is shared here"))
    for chunk in model_chunks:
        _tie_chunk(chunk, topology)
    place_copies(model_chunks, topology)
    return model_chunks


def _tie_chunk(chunk: MegatronModule, topology: TieTopology) -> None:
    if topology.num_layers != chunk.config.num_layers:
        valid = f"the topology is made for {topology.num_layers} layers: build it for the same number"
        raise ConfigError(Problem("config.num_layers", chunk.config.num_layers, valid))
    # Layers of one form cannot hold banks in a distributed checkpoint: each is to have keys of its own.
    chunk.config.hetereogenous_dist_checkpoint = True
    banks = ExpertBanks(topology)
    for index, layer in _moe_layers(chunk):
        if topology.bank_of_layer[index] is None:
            valid = "is an MoE layer of the model: the topology must give it a bank"
            raise ConfigError(Problem("topology.bank_of_layer", f"None for layer {index}", valid))
        if not isinstance(layer, TiedMoELayer):
            TiedMoELayer.adopt(layer, banks, index)
    uses = Counter(layer.bank.index for layer in tied_layers(chunk))
    for layer in tied_layers(chunk):
        if uses[layer.bank.index] > 1:
            _add_to_main_grad(layer.experts)
        leave_gradients_to_autograd(layer.experts)
        for weight in layer.experts.parameters():
            weight.bank_lr_divisor = topology.lr_divisor(layer.bank)


def _add_to_main_grad(experts: torch.nn.Module) -> None:
    """Let no use site take itself for the first of a step.

    Transformer Engine's linear layers write their weight gradient over what is in `main_grad` in a module's first
    micro-batch, and a bank has a module for every layer. Without the flag for it they always add.
    """
    for module in experts.modules():
        if hasattr(module, _ALWAYS_ADDS):
            setattr(module, _ALWAYS_ADDS, True)


def _moe_layers(chunk: MegatronModule) -> Iterator[tuple[int, MoELayer]]:
    """The chunk's MoE decoder layers, each with its number in the whole model, from 0."""
    # The language model of a multimodal one keeps its decoder to itself.
    holder = chunk if hasattr(chunk, "decoder") else chunk.language_model
    for layer in holder.decoder.layers:
        if isinstance(layer.mlp, MoELayer):
            yield layer.layer_number - 1, layer.mlp
