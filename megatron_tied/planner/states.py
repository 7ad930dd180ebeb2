"""Weights, gradients and optimizer states on one rank under ZeRO, as DeepSpeed 0.19 allocates them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_tied.models.config import ModelConfig
from megatron_tied.planner.gathering import Gathering, gathering
from megatron_tied.planner.layout import Layout
from megatron_tied.planner.sharding import bank_elements, local_copies, local_elements, local_size, stage_tensors
from megatron_tied.planner.tensors import Kind, Tensor
from megatron_tied.topology import TieTopology

# DeepSpeed pads a flat group so that each partition starts at an even element.
_ALIGNMENT = 2
# Where it cuts a group of expert parallel parameters (split_params_into_different_moe_groups_for_optimizer).
_MAX_EXPERT_GROUP = 178_956_971
_FP32 = 4
# Elements that Muon works on at once (engine/locations.py), and bytes of each of them meanwhile.
MUON_AT_ONCE, _MUON_BYTES = 1 << 24, 12
# Parameters that Muon leaves to AdamW.
_NO_MUON = frozenset({"embedding", "output", "norms", "router"})


class Group(NamedTuple):
    """One optimizer group on a rank: the sizes of its parameters, over how many ranks ZeRO partitions them, and how
    many bytes its optimizer keeps for an element beside the fp32 weight."""

    sizes: tuple[int, ...]
    ranks: int
    moments: int

    @property
    def elements(self) -> int:
        """Elements with the padding of stages 1 and 2."""
        unit = self.ranks * _ALIGNMENT
        return -(-sum(self.sizes) // unit) * unit

    @property
    def partition(self) -> int:
        """Elements of one rank's partition at stages 1 and 2."""
        return self.elements // self.ranks

    @property
    def partition_by_parameter(self) -> int:
        """Elements of one rank's partition at stage 3, which cuts each parameter by itself."""
        return sum(-(-size // self.ranks) for size in self.sizes)

    def touching_partitions(self) -> list[int]:
        """For each partition the elements of the whole parameters of which it has any part."""
        partition, start = self.partition, 0
        touching = [0] * self.ranks
        for size in self.sizes:
            for rank in range(start // partition, (start + size - 1) // partition + 1):
                touching[rank] += size
            start += size
        return touching


@dataclass(frozen=True)
class ModelStates:
    """Bytes on one rank's device and, if offloaded, in host memory.

    gradients: the most that exist at once, communication buckets aside: whole at stages 0 and 1, the rank's
    partition at 2 and 3. parameters: this rank's whole parameters by kind, in elements.
    """

    parameters: Mapping[Kind, int]
    weights: int
    gradients: int
    optimizer: int
    host: int
    # Elements of each group's partition, in the order in which they are updated, and whether Muon does that.
    partitions: tuple[int, ...]
    by_muon: tuple[bool, ...]
    # Bytes of whole gradients that come into being in each layer's backward; a bank's with its last use.
    layer_gradients: Mapping[int, int]
    # Elements of each bank's weights here, and of the largest tensor.
    banks: Mapping[int, int]
    largest_tensor: int
    gathered: Gathering

    @property
    def device(self) -> int:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimizer


def model_states(
    model: ModelConfig, topology: TieTopology, layout: Layout, layers: range, vocab_size: int
) -> ModelStates:
    """The states of a rank of the pipeline stage that has `layers` (all layers: no pipeline)."""
    tensors = list(stage_tensors(model, topology, layers, vocab_size))
    groups = optimizer_groups([tensor for tensor in tensors if tensor.kind not in layout.frozen], topology, layout)
    parameters: Counter[Kind] = Counter()
    for tensor in tensors:
        parameters[tensor.kind] += local_elements(tensor, layout)
    partitioned = layout.zero_stage == 3
    elements = sum(group.elements if 0 < layout.zero_stage < 3 else sum(group.sizes) for group in groups)
    parts = [_partition(group, layout) for group in groups]
    held = sum(parts)
    weights = ((held if partitioned else elements) + _frozen_elements(tensors, layout)) * layout.width
    gradients = _gradient_elements(groups, layout, elements, held) * layout.width
    # Stage 0 updates the fp32 weights themselves; elsewhere there is a master copy, of fp32 weights too.
    master = 0 if layout.zero_stage == 0 else _FP32
    optimizer = sum(part * (master + group.moments) for part, group in zip(parts, groups, strict=True))
    largest = max(local_size(tensor, layout) for tensor in tensors)
    host = 0
    if layout.offload_optimizer:
        host, optimizer = optimizer + _gradients_on_host(groups, layout, held, largest), 0
        # On the device none stays, save those that stage 1 still has to reduce.
        gradients = gradients if layout.zero_stage < 2 else 0
    if layout.offload_parameters:
        host, weights = host + weights, 0
    return ModelStates(
        parameters,
        weights,
        gradients,
        optimizer,
        host,
        partitions=tuple(parts),
        by_muon=tuple(group.moments == _FP32 for group in groups),
        layer_gradients=_layer_gradients(tensors, topology, layout, layers),
        banks=bank_elements(tensors, layout),
        largest_tensor=largest,
        gathered=gathering(tensors, topology, layout),
    )


def update_bytes(elements: int, by_muon: bool) -> int:
    """What an update of so many elements takes: their gradient in fp32, and temporaries, of which AdamW has two."""
    return _FP32 * elements + (_MUON_BYTES * min(elements, MUON_AT_ONCE) if by_muon else 2 * _FP32 * elements)


def _gradients_on_host(groups: Sequence[Group], layout: Layout, held: int, largest: int) -> int:
    """Bytes of gradients beside an offloaded optimizer: in fp32 for it, and those of earlier micro-batches.

    Below stage 3 the latter are whole, with a buffer through which they pass.
    """
    if layout.zero_stage == 3:
        return held * (_FP32 + layout.width)
    earlier = _kept(groups, layout) if layout.accumulation > 1 else 0
    return held * _FP32 + (largest + earlier) * layout.width


def _layer_gradients(tensors: Sequence[Tensor], topology: TieTopology, layout: Layout, layers: range) -> dict[int, int]:
    """See `ModelStates.layer_gradients`."""
    gradients = dict.fromkeys(layers, 0)
    for tensor in tensors:
        if tensor.kind in layout.frozen:
            continue
        if tensor.bank is not None:
            layer = max(layer for layer in topology.banks[tensor.bank].layers if layer in layers)
        elif tensor.layer is not None:
            layer = tensor.layer
        else:
            layer = layers[0] if tensor.kind == "embedding" else layers[-1]
        gradients[layer] += local_elements(tensor, layout) * layout.width
    return gradients


def _frozen_elements(tensors: Sequence[Tensor], layout: Layout) -> int:
    """Elements of frozen parameters on a rank: whole up to stage 2, in partitions at stage 3."""
    frozen = [tensor for tensor in tensors if tensor.kind in layout.frozen]
    if layout.zero_stage < 3:
        return sum(local_elements(tensor, layout) for tensor in frozen)
    return sum(-(-local_size(tensor, layout) // layout.data_parallel) for tensor in frozen)


def _partition(group: Group, layout: Layout) -> int:
    if layout.zero_stage == 0:
        return sum(group.sizes)
    return group.partition_by_parameter if layout.zero_stage == 3 else group.partition


def _gradient_elements(groups: Sequence[Group], layout: Layout, elements: int, held: int) -> int:
    if layout.zero_stage < 2:
        return elements
    if layout.zero_stage == 3:
        return held
    # Those accumulated so far, and those of the micro-batch at hand.
    return _kept(groups, layout) * min(layout.accumulation, 2)


def _kept(groups: Sequence[Group], layout: Layout) -> int:
    """Elements of whole gradients that stage 2 keeps: of every parameter of which a rank's partition has a part."""
    touching = [group.touching_partitions() for group in groups]
    world = layout.world_size // layout.pipeline_parallel
    return max(
        sum(of_group[rank * group.ranks // world] for group, of_group in zip(groups, touching, strict=True))
        for rank in range(world)
    )


def optimizer_groups(tensors: Sequence[Tensor], topology: TieTopology, layout: Layout) -> list[Group]:
    """The optimizer's groups as `parameter_groups` makes them: by weight decay, and banks by their LR divisor."""
    sizes: defaultdict[tuple[bool, float, bool, int], list[int]] = defaultdict(list)
    for tensor in tensors:
        is_expert = tensor.kind == "bank"
        divisor = 1.0
        if tensor.bank is not None and (is_expert or (tensor.kind == "attention" and tensor.decays)):
            divisor = topology.lr_divisor(topology.banks[tensor.bank])
        group = is_expert, divisor, tensor.decays, _moments(tensor, layout)
        sizes[group] += [local_size(tensor, layout)] * local_copies(tensor, layout)
    groups = []
    for (is_expert, _, _, moments), of_group in sizes.items():
        ranks = layout.expert_data_parallel if is_expert else layout.data_parallel
        # Marked as expert parallel where neighbouring ranks differ: see mark_expert_parameters.
        cut = _MAX_EXPERT_GROUP if is_expert and max(layout.expert_parallel, layout.tensor_parallel) > 1 else None
        groups += [Group(part, ranks, moments) for part in _split(of_group, cut)]
    return groups


def _moments(tensor: Tensor, layout: Layout) -> int:
    momentum_only = layout.optimizer == "muon" and tensor.decays and tensor.kind not in _NO_MUON
    return _FP32 if momentum_only else 2 * _FP32


def _split(sizes: Sequence[int], largest: int | None) -> Iterator[tuple[int, ...]]:
    part: list[int] = []
    total = 0
    for size in sizes:
        if largest is not None and part and total + size > largest:
            yield tuple(part)
            part, total = [], 0
        part.append(size)
        total += size
    yield tuple(part)
