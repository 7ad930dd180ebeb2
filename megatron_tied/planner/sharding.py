"""Which parameters a rank of a pipeline stage has, and how much of each, before ZeRO partitions them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from megatron_tied.models.config import ModelConfig
from megatron_tied.planner.layout import Layout
from megatron_tied.planner.tensors import Tensor, bank_tensors, layer_tensors, model_tensors
from megatron_tied.topology import TieTopology


def stage_tensors(model: ModelConfig, topology: TieTopology, layers: range, vocab_size: int) -> Iterator[Tensor]:
    """The parameters of the pipeline stage with `layers`: a bank's stand in the first of its layers that is there."""
    if len(layers) == model.num_layers:
        yield from model_tensors(model, topology, vocab_size)
        return
    ends = [tensor for tensor in model_tensors(model, topology, vocab_size) if tensor.layer is None]
    yield from ends[:1] if layers.start == 0 else ()
    for layer in layers:
        yield from layer_tensors(model, topology, layer)
        if topology.bank_of_layer[layer] is None:
            continue
        bank = topology.bank(layer)
        if bank.owner < layers.start and layer == min(set(bank.layers) & set(layers)):
            experts = topology.num_experts(bank, model.num_moe_experts)
            for tensor in bank_tensors(model, bank, experts):
                yield tensor._replace(layer=layer)
    yield from ends[1:] if layers.stop == model.num_layers else ()


def local_elements(tensor: Tensor, layout: Layout) -> int:
    """Elements of a parameter, all copies together, that one rank has before ZeRO partitions them."""
    return local_size(tensor, layout) * local_copies(tensor, layout)


def bank_elements(tensors: Iterable[Tensor], layout: Layout) -> Counter[int]:
    """Elements of the weights of each expert bank among `tensors` that one rank has."""
    found: Counter[int] = Counter()
    for tensor in tensors:
        if tensor.expert_bank is not None:
            found[tensor.expert_bank] += local_elements(tensor, layout)
    return found


def local_size(tensor: Tensor, layout: Layout) -> int:
    """Elements of one copy of a parameter on one rank."""
    if tensor.cut == "tensor":
        return tensor.numel // layout.tensor_parallel
    return tensor.numel // layout.expert_parallel if tensor.cut == "expert" and tensor.copies == 1 else tensor.numel


def local_copies(tensor: Tensor, layout: Layout) -> int:
    """How many copies of a parameter one rank has."""
    return tensor.copies // layout.expert_parallel if tensor.copies > 1 else 1
