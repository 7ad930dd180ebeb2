"""ZeRO 3: which parameters a pass gathers once, and how many elements are gathered at the same time.

DeepSpeed lets a parameter go after its use unless it is used again within `stage3_max_reuse_distance` elements
(`PartitionedParameterCoordinator.__params_to_release`). For tied models the engine sets that distance so that a bank
stays through its tie group; the default keeps what lies near the turn from forward to backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from megatron_tied.planner.layout import Layout
from megatron_tied.planner.sharding import bank_elements, local_elements, local_size
from megatron_tied.planner.tensors import Tensor
from megatron_tied.topology import TieTopology

# DeepSpeed's default of stage3_max_reuse_distance.
_DEFAULT_REUSE_DISTANCE = 1_000_000_000


class Gathering(NamedTuple):
    """Elements on one rank.

    kept_*: gathered once, after the update, and never let go. dense, bank: gathered in a micro-batch, each as often
    as it is. live: at once, what is fetched ahead included. prefetches: whether anything is: DeepSpeed fetches
    nothing ahead while more than `stage3_max_live_parameters` are there.
    """

    kept_dense: int
    kept_bank: int
    dense: int
    bank: int
    live: int
    prefetches: bool


def gathering(tensors: Sequence[Tensor], topology: TieTopology, layout: Layout) -> Gathering:
    """What ZeRO 3 gathers of `tensors`, those of one pipeline stage."""
    placed = _in_order_of_last_use(tensors, topology)
    per_layer = _elements_per_layer(tensors, topology, layout)
    distance = _reuse_distance(tensors, topology, per_layer, layout)
    gathered, kept = {False: 0, True: 0}, {False: 0, True: 0}
    after = kept_at_turn = largest_end = largest = 0
    # A bank's tensors belong to one module, so they stay or go together.
    for bank, module in groupby(reversed(placed), key=lambda tensor: tensor.expert_bank):
        at_module, is_bank = after, bank is not None
        for tensor in module:
            elements = local_elements(tensor, layout)
            stays = 2 * (at_module if is_bank else after) < distance
            if local_size(tensor, layout) <= layout.persistence_threshold:
                kept[is_bank] += elements
            else:
                kept_at_turn += elements if stays else 0
                gathered[is_bank] += elements * (1 if stays else 2)
            if tensor.layer is None:
                largest_end = max(largest_end, elements)
            largest = max(largest, local_size(tensor, layout))
            after += elements
    live = max(kept_at_turn, largest_end, *per_layer.values()) + sum(kept.values())
    prefetches = layout.prefetch_bucket_size > 0 and live < layout.max_live_parameters
    # Whole tensors are fetched ahead.
    ahead = max(layout.prefetch_bucket_size, largest) if prefetches else 0
    return Gathering(kept[False], kept[True], gathered[False], gathered[True], min(live + ahead, after), prefetches)


def _in_order_of_last_use(tensors: Sequence[Tensor], topology: TieTopology) -> list[Tensor]:
    """`tensors` in the order of forward, each bank in the last of its layers that is here."""
    layers = {tensor.layer for tensor in tensors}
    last_use = {
        bank.index: max((layer for layer in bank.layers if layer in layers), default=None) for bank in topology.banks
    }
    first: list[Tensor] = []
    last: list[Tensor] = []
    inside: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        where = tensor.layer if tensor.bank is None else last_use[tensor.bank]
        if where is None:
            (first if tensor.kind == "embedding" else last).append(tensor)
        else:
            inside.setdefault(where, []).append(tensor)
    return first + [tensor for layer in sorted(inside) for tensor in inside[layer]] + last


def _elements_per_layer(tensors: Sequence[Tensor], topology: TieTopology, layout: Layout) -> Mapping[int, int]:
    """Elements that each layer works with, its bank's included whoever owns it."""
    found = {tensor.layer: 0 for tensor in tensors if tensor.layer is not None}
    for tensor in tensors:
        if tensor.layer is None:
            continue
        for layer in (tensor.layer,) if tensor.bank is None else topology.banks[tensor.bank].layers:
            if layer in found:
                found[layer] += local_elements(tensor, layout)
    return found


def _reuse_distance(
    tensors: Sequence[Tensor], topology: TieTopology, per_layer: Mapping[int, int], layout: Layout
) -> int:
    """The user's; else as `engine.zero3.bank_reuse_distance` sets it; DeepSpeed's own without ties."""
    if layout.max_reuse_distance is not None:
        return layout.max_reuse_distance
    of_bank = bank_elements(tensors, layout)
    distances = []
    for bank in topology.banks:
        for earlier, later in zip(bank.layers, bank.layers[1:], strict=False):
            ends = of_bank[bank.index] * (1 if topology.shares_more else 2)
            between = sum(per_layer.get(layer, 0) for layer in range(earlier, later + 1)) - ends
            distances.append(between + 1)
    return max(distances, default=_DEFAULT_REUSE_DISTANCE)
