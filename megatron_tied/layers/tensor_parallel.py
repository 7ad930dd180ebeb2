"""How tensor parallelism cuts parameters: Megatron-Core's marks, and a rank's part of a whole matrix."""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from megatron_tied.layers.attention import ProjectionRMSNorm
from megatron_tied.layers.marks import mark, marks_of
from megatron_tied.layers.moe_layer import tied_layers

# Megatron-Core's names. Column parallel layers are cut along their outputs, biases included; row parallel ones along
# their inputs.
_COLUMN_PARALLEL = (
    *("word_embeddings", "output_layer", "linear_qkv", "linear_fc1"),
    *("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj"),
)
_ROW_PARALLEL = ("linear_proj", "linear_fc2")


def mark_tensor_parallel(model: torch.nn.Module) -> None:
    """Mark every parameter that tensor parallel ranks hold parts of, as Megatron-Core does when it initialises weights.

    Where gate and up rows are each cut, a rank's part has two pieces (`partition_stride`).
    Routed experts are whole on every rank (an expert tensor parallel size of 1).
    """
    experts = {id(weight) for layer in tied_layers(model) for weight in layer.experts.parameters()}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            dim = _partition_dim(path.rpartition(".")[2], module, name)
            if dim is None or id(parameter) in experts:
                continue
            is_gated = path.endswith("linear_fc1") and module.config.gated_linear_unit
            mark(parameter, tensor_model_parallel=True, partition_dim=dim, partition_stride=2 if is_gated else 1)


def _partition_dim(layer: str, module: torch.nn.Module, name: str) -> int | None:
    if isinstance(module, ProjectionRMSNorm) or (layer in _COLUMN_PARALLEL and name in ("weight", "bias")):
        return 0
    return 1 if layer in _ROW_PARALLEL and name == "weight" else None


def is_tensor_parallel(tensor: torch.Tensor) -> bool:
    """True for a parameter of which each tensor parallel rank holds another part; buffers are whole."""
    return marks_of(tensor).get("tensor_model_parallel", False)


def whole_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """The shape of `parameter` over all tensor parallel ranks."""
    shape = list(parameter.shape)
    if is_tensor_parallel(parameter):
        shape[marks_of(parameter)["partition_dim"]] *= parallel_state.get_tensor_model_parallel_world_size()
    return torch.Size(shape)


def local_part(whole: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    """The part of `whole`, which has `whole_shape(parameter)`, that this tensor parallel rank holds."""
    if not is_tensor_parallel(parameter):
        return whole
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    marks = marks_of(parameter)
    pieces = whole.chunk(size * marks["partition_stride"], dim=marks["partition_dim"])
    return torch.cat(pieces[rank::size], dim=marks["partition_dim"])
