"""Initial weights of a whole model, the same at any data, expert, tensor or ZeRO partitioning."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_tied.layers.initialization import DepthScaledXavier, initialize_matrix
from megatron_tied.layers.moe_layer import tied_layers
from megatron_tied.layers.tensor_parallel import local_part, mark_tensor_parallel, whole_shape

_QKV = "self_attention.linear_qkv.weight"
_OUTPUT_PROJECTIONS = ("linear_proj.weight", "linear_fc2.weight")


@torch.no_grad()
def initialize_weights(model: torch.nn.Module, config: TransformerConfig, seed: int) -> None:
    """Fill every matrix of `model` from the stream of its name and every bias and sink with zeros; norm gains stay
    as made.

    Methods as in Megatron-Core: `output_layer_init_method` for projections back into the residual stream,
    `embedding_init_method` for the word embedding, `init_method` for the rest.
    """
    mark_tensor_parallel(model)
    experts = {id(weight) for layer in tied_layers(model) for weight in layer.experts.parameters()}
    for name, weight in model.named_parameters():
        # Transformer Engine numbers the biases of its grouped experts: bias0, bias1, ...
        # Attention sinks (softmax_offset) are made of whatever memory holds.
        if name.rstrip("0123456789").endswith(("bias", "softmax_offset")):
            torch.nn.init.zeros_(weight)
        if weight.dim() < 2 or id(weight) in experts:
            continue
        method = config.init_method
        if name.endswith(_OUTPUT_PROJECTIONS):
            method = config.output_layer_init_method
        elif "word_embeddings" in name:
            method = config.embedding_init_method
        if isinstance(method, DepthScaledXavier) and name.endswith(_QKV):
            # Its bounds follow from the sizes of a matrix, and these are three.
            method = _of_query_key_and_value(method, config)
        whole = torch.empty(whole_shape(weight))
        initialize_matrix(whole, method, seed, name)
        weight.copy_(local_part(whole, weight))
    for layer in tied_layers(model):
        if layer.is_owner:
            layer.initialize_experts(seed)


def _of_query_key_and_value(
    method: Callable[[torch.Tensor], torch.Tensor], config: TransformerConfig
) -> Callable[[torch.Tensor], torch.Tensor]:
    """`method` for each of the three in Megatron-Core's projection, where they lie side by side in each query group."""
    width, groups = config.kv_channels, config.num_query_groups
    queries = config.num_attention_heads // groups * width

    def fill(matrix: torch.Tensor) -> torch.Tensor:
        by_group = matrix.view(groups, queries + 2 * width, -1)
        for part in torch.split(by_group, [queries, width, width], dim=1):
            part.copy_(method(torch.empty(part.flatten(0, 1).shape)).view_as(part))
        return matrix

    return fill
