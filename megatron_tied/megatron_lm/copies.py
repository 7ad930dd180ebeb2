"""Banks that several chunks of a pipeline use: each chunk keeps a copy, and their gradients are summed.

As Megatron-Core does for tied embeddings: the copies begin equal, get the same gradient, and so stay equal; the
gradient norm and the checkpoint count the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.exchange import gather_json
from megatron_tied.layers.banks import describe
from megatron_tied.layers.moe_layer import TiedMoELayer, tied_layers
from megatron_tied.platform import device
from megatron_tied.topology import Bank, TieTopology

Holder = tuple[int, int]  # pipeline rank, and which chunk of that rank


@dataclass(frozen=True)
class BankCopy:
    """What the owner of a copy knows of the others: all `holders` in pipeline order, and which one it is.

    group: the ranks that hold copies; None where all of them lie on this rank.
    """

    holders: tuple[Holder, ...]
    index: int
    group: torch.distributed.ProcessGroup | None


def place_copies(model_chunks: Sequence[MegatronModule], topology: TieTopology) -> None:
    """Find the banks that several chunks hold, make their copies equal, and mark them; a collective of all ranks.

    Raises `ConfigError` if there are any and the topology's pipeline is "align".
    """
    holders = _holders(model_chunks, topology)
    shared = {bank: who for bank, who in holders.items() if len(who) > 1}
    if shared and topology.tie.pipeline == "align":
        raise ConfigError(_straddling(topology.banks[bank]) for bank in shared)
    groups = _groups({tuple(sorted({rank for rank, _ in who})) for who in shared.values()})
    rank = parallel_state.get_pipeline_model_parallel_rank()
    for number, chunk in enumerate(model_chunks):
        chunk.bank_copies = copies = {}
        for layer in tied_layers(chunk):
            if layer.is_owner and layer.bank.index in shared:
                who = shared[layer.bank.index]
                group = groups.get(tuple(sorted({stage for stage, _ in who})))
                copies[layer] = BankCopy(who, who.index((rank, number)), group)
                _mark(layer, copies[layer])
        if copies:
            chunk.sharded_state_dict = partial(_with_bank_keys, chunk.sharded_state_dict, copies)
    _make_equal(model_chunks)


def sum_bank_copies(model_chunks: Iterable[torch.nn.Module]) -> None:
    """Give all copies of a bank the sum of their gradients; to follow Megatron-Core's `finalize_model_grads`.

    `model_chunks` may be wrapped. With the distributed optimizer the sum is right in the part of the gradient that
    this rank updates: a copy has a bucket of its own, and so the same part, in every chunk. Raises `RuntimeError` for
    a model that `tie_experts` has not seen, or that has no gradients.
    """
    for copy, layers in _local_copies(model_chunks):
        gradients = [[_gradient(weight) for weight in layer.experts.parameters()] for layer in layers]
        for same in zip(*gradients, strict=True):
            for other in same[1:]:
                same[0].add_(other)
            if copy.group is not None:
                torch.distributed.all_reduce(same[0], group=copy.group)
            for other in same[1:]:
                other.copy_(same[0])


def _holders(model_chunks: Sequence[MegatronModule], topology: TieTopology) -> dict[int, tuple[Holder, ...]]:
    """Who holds each bank, in pipeline order."""
    here = [[layer.layer_index for layer in tied_layers(chunk)] for chunk in model_chunks]
    group = parallel_state.get_pipeline_model_parallel_group()
    first_use: dict[int, dict[Holder, int]] = {}
    for rank, chunks in enumerate(gather_json(here, group)):
        for number, layers in enumerate(chunks):
            for layer in reversed(layers):
                first_use.setdefault(topology.bank(layer).index, {})[rank, number] = layer
    return {bank: tuple(sorted(uses, key=uses.__getitem__)) for bank, uses in sorted(first_use.items())}


def _groups(stage_sets: set[tuple[int, ...]]) -> dict[tuple[int, ...], torch.distributed.ProcessGroup]:
    """This rank's process group for each set of stages; every rank makes all groups, in the same order."""
    mine = torch.distributed.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
    pipelines = gather_json(mine)
    groups = {}
    for stages in sorted(stages for stages in stage_sets if len(stages) > 1):
        for pipeline in sorted(set(map(tuple, pipelines))):
            group = torch.distributed.new_group([pipeline[stage] for stage in stages])
            if pipeline == tuple(mine):
                groups[stages] = group
    return groups


def _mark(layer: TiedMoELayer, copy: BankCopy) -> None:
    for weight in layer.experts.parameters():
        # Megatron-Core's marks for embeddings: a bucket of its own in the distributed optimizer, and, but for the
        # first copy, no part in the gradient norm.
        weight.shared_embedding = True
        weight.shared = copy.index > 0


@torch.no_grad()
def _make_equal(model_chunks: Iterable[torch.nn.Module]) -> None:
    for copy, layers in _local_copies(model_chunks):
        source = None if copy.group is None else _global_rank(copy.holders[0][0])
        for same in zip(*(layer.experts.parameters() for layer in layers), strict=True):
            value = same[0].to(device())
            if copy.group is not None:
                torch.distributed.broadcast(value, source, group=copy.group)
            for weight in same:
                weight.copy_(value)


def _local_copies(model_chunks: Iterable[torch.nn.Module]) -> Iterator[tuple[BankCopy, list[TiedMoELayer]]]:
    """For each bank with copies elsewhere, its copies on this rank, the first in pipeline order first."""
    copies: dict[TiedMoELayer, BankCopy] = {}
    for chunk in model_chunks:
        copies |= _copies_of(chunk)
    owners = sorted(copies, key=lambda layer: (layer.bank.index, layer.layer_index))
    for _, layers in groupby(owners, key=lambda layer: layer.bank.index):
        first, *others = layers
        yield copies[first], [first, *others]


def _copies_of(chunk: torch.nn.Module) -> dict[TiedMoELayer, BankCopy]:
    model: torch.nn.Module | None = chunk
    while model is not None:
        copies: dict[TiedMoELayer, BankCopy] | None = getattr(model, "bank_copies", None)
        if copies is not None:
            return copies
        # Under DDP and the cast to half precision, each of which keeps what it wraps as `module`.
        model = getattr(model, "module", None)
    raise RuntimeError(
        "no experts are tied in this model: the script builds it where expert tying does not reach. Give the model "
        "chunks to megatron_tied.megatron_lm.tie_experts before they are wrapped in DDP"
    )


def _gradient(weight: torch.nn.Parameter) -> torch.Tensor:
    main: torch.Tensor | None = getattr(weight, "main_grad", None)
    gradient = weight.grad if main is None else main
    if gradient is None:
        raise RuntimeError("the weights of an expert bank have no gradients to sum: wrap the model in Megatron's DDP")
    return gradient


def _global_rank(stage: int) -> int:
    return torch.distributed.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())[stage]


def _with_bank_keys(
    sharded_state_dict: Callable[..., dict[str, Any]], copies: dict[TiedMoELayer, BankCopy], *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """The chunk's sharded state, in which every copy goes by the first one's name, as a replica of it."""
    state = sharded_state_dict(*args, **kwargs)
    for layer, copy in copies.items():
        held, first = (f"decoder.layers.{index}.mlp.experts." for index in (layer.layer_index, layer.bank.owner))
        for tensor in state.values():
            if held in getattr(tensor, "key", "") and not tensor.key.endswith("_extra_state"):
                tensor.key = tensor.key.replace(held, first)
                tensor.replica_id = (copy.index, *tensor.replica_id[1:])
    return state


def _straddling(bank: Bank) -> Problem:
    valid = "must lie in one model chunk: cut the pipeline between tie groups, or set it to allreduce"
    return Problem("tie.pipeline", "align", f"{describe(bank)} {valid}")
