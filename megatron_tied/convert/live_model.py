"""A source's weights in a model that computes: Megatron-Core's, in this one process, in float32."""

# ruff: noqa: E402  (Megatron-Core must be imported after the host is prepared)
from __future__ import annotations

from collections.abc import Container, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_tied.platform import device, prepare

prepare()

from megatron.core.models.gpt import GPTModel

from megatron_tied.checkpoint.loader import Checkpoint, load_weights
from megatron_tied.convert.sources import WeightSource
from megatron_tied.convert.tensors import KINDS
from megatron_tied.inference.loading import find_model, inference_config
from megatron_tied.layers.backends import expert_matrices
from megatron_tied.layers.moe_layer import TiedMoELayer, tied_layers
from megatron_tied.models.config import ModelConfig
from megatron_tied.models.gpt import build_gpt_model
from megatron_tied.topology import TieConfig

# How many tokens go through a layer at once: their attention has a matrix for every head.
_TOGETHER = 1024


def model_of(source: WeightSource) -> GPTModel:
    """A model with the weights of `source` and a bank of its own for every layer; inside `one_process`."""
    model = _without_experts(source, TieConfig())
    for layer in tied_layers(model):
        put_experts(layer, source)
    return model


def model_of_one_bank(source: WeightSource) -> GPTModel:
    """Such a model with memory for one layer's experts: `put_experts` must come before each layer's.

    All layers of `source` must have the same number of experts.
    """
    return _without_experts(source, TieConfig(banks=(0,) * len(source.topology.moe_layers)))


@torch.no_grad()
def put_experts(layer: TiedMoELayer, source: WeightSource) -> None:
    """Copy the experts that `layer` uses in `source` into the bank that it uses here."""
    for kind in KINDS:
        matrices = source.read_experts(layer.layer_index, kind)
        for own, matrix in zip(expert_matrices(layer.experts), matrices, strict=True):
            own[kind].copy_(matrix)


@torch.no_grad()
def _without_experts(source: WeightSource, tie: TieConfig) -> GPTModel:
    model = _build(source.config, tie)
    experts = {id(weight) for layer in tied_layers(model) for weight in layer.experts.parameters()}
    kept = model.state_dict().keys()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in experts and name in kept:
            tensor.copy_(source.read(name))
    return model.eval()


def model_of_checkpoint(directory: Path) -> GPTModel:
    """The model that the checkpoint `directory` is of, as training would load it; inside `one_process`."""
    found = find_model(directory, field="--input")
    model = _build(found.config, found.tie)
    load_weights(model, Checkpoint(found.path, found.manifest))
    return model.eval()


def logits(model: GPTModel, tokens: torch.Tensor) -> torch.Tensor:
    """[batch, sequence, vocabulary], on the host."""
    return _forward(model, tokens).float().cpu()


class Routed(NamedTuple):
    """What one MoE layer made of all tokens: its router's inputs [tokens, hidden], and what that decided.

    combine_weights, routing_map: [tokens, experts].
    """

    layer: TiedMoELayer
    states: torch.Tensor
    combine_weights: torch.Tensor
    routing_map: torch.Tensor


@torch.no_grad()
def routed(model: GPTModel, source: WeightSource, tokens: torch.Tensor, wanted: Container[int]) -> Iterator[Routed]:
    """Run `tokens` [sequences, length] through `model_of_one_bank(source)`; yields each MoE layer that is `wanted`.

    All sequences go through a layer, a few at a time, before any goes through the next: its experts are read once, and
    of what grows with the tokens there are only the states between layers, and those that a router is given.
    """
    length = tokens.shape[1]
    mask = _causal_mask(length).to(device())
    # Latent attention makes its own.
    rotary = None if model.config.multi_latent_attention else model.rotary_pos_emb(length)
    parts = [
        model.embedding(input_ids=part.to(device()), position_ids=torch.arange(length, device=device()).expand_as(part))
        for part in tokens.split(max(1, _TOGETHER // length))
    ]
    for layer in model.decoder.layers:
        seen: list[tuple[torch.Tensor, ...]] = []
        hooks = []
        if isinstance(layer.mlp, TiedMoELayer):
            put_experts(layer.mlp, source)
            if layer.mlp.layer_index in wanted:
                hooks.append(
                    layer.mlp.router.register_forward_hook(
                        lambda _, given, made, seen=seen: seen.append((*given[:1], *made))
                    )
                )
        for index, part in enumerate(parts):
            parts[index] = layer(hidden_states=part, attention_mask=mask, rotary_pos_emb=rotary)[0]
        for hook in hooks:
            hook.remove()
            yield Routed(layer.mlp, *(_over_all(seen, which) for which in range(3)))


def _over_all(seen: list[tuple[torch.Tensor, ...]], which: int) -> torch.Tensor:
    """One of the tensors that a router saw or made, of all sequences: in the order in which it would be at once."""
    columns = [part[which].view(*part[0].shape[:2], -1) for part in seen]
    return torch.cat(columns, dim=1).flatten(0, 1)


@torch.no_grad()
def _forward(model: GPTModel, tokens: torch.Tensor) -> torch.Tensor:
    length = tokens.shape[1]
    inputs = (tokens, torch.arange(length).expand_as(tokens), _causal_mask(length))
    found: torch.Tensor = model(*(tensor.to(device()) for tensor in inputs))
    return found


def _causal_mask(length: int) -> torch.Tensor:
    return torch.ones(length, length).triu(1).bool()[None, None]


def _build(config: ModelConfig, tie: TieConfig) -> GPTModel:
    # What is another way to compute the same stays out.
    fields = inference_config(config).model_dump() | {"expert_backend": "sequential"}
    return build_gpt_model(ModelConfig.resolve(fields), tie, use_transformer_engine=False)
