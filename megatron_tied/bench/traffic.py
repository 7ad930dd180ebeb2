"""What one step hands to gradient reductions, for experts and for the rest, and how often ZeRO 3 gathers a bank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from megatron.core import parallel_state
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tied.bench.contender import Contender, elements, is_expert, layer_of
from megatron_tied.topology import TieTopology

_REDUCTIONS = frozenset(
    {
        *("allreduce_", "allreduce_coalesced_", "reduce_"),
        *("_reduce_scatter_base_", "reduce_scatter_", "reduce_scatter_tensor_coalesced_"),
    }
)
# Of what DeepSpeed's coordinator of ZeRO 3 gathers, all goes through it.
_GATHER = "_PartitionedParameterCoordinator__all_gather_params_"


@dataclass(frozen=True)
class ReductionBytes:
    """Bytes of the tensors that this rank hands to gradient reductions in a step; 0 where no rank shares the weights.

    tied_layers: of `experts`, those of the layers that `tied` ties, in any contender. rest: of all that is no routed
    expert.
    """

    experts: int
    tied_layers: int
    rest: int

    def to_json(self) -> dict[str, int]:
        """By name."""
        return asdict(self)


@dataclass(frozen=True)
class StepTraffic:
    """Of one step. gathers: per micro-batch and tie group of the tied model; None unless ZeRO 3 partitions weights."""

    reductions: ReductionBytes
    gathers: float | None


def measure_traffic(contender: Contender, step: Callable[[], object], tied: TieTopology) -> StepTraffic:
    """Of `step`, one step of `contender`; `tied` is the topology of the tied model."""
    with _Reductions(contender) as reductions, _counting_gathers(contender) as gathers:
        step()
    parameters = contender.parameters
    in_groups = tied_layers_of(tied)
    sizes = Counter[str]()
    for name, parameter in parameters.items():
        kind = "rest" if not is_expert(name) else "tied" if layer_of(name) in in_groups else "untied"
        sizes[kind] += elements(parameter)
    found = attribute(
        reductions.payload,
        sizes,
        width=reductions.width,
        times=contender.reductions,
        ranks=torch.distributed.get_world_size() // parallel_state.get_tensor_model_parallel_world_size(),
        expert_ranks=parallel_state.get_expert_data_parallel_world_size() if contender.shards_experts else None,
    )
    partitioned = any(hasattr(parameter, "ds_numel") for parameter in parameters.values())
    return StepTraffic(found, _per_group(gathers, contender, tied) if partitioned else None)


def attribute(
    payload: Counter[int],
    sizes: Counter[str],
    *,
    width: int,
    times: int,
    ranks: int,
    expert_ranks: int | None,
) -> ReductionBytes:
    """Who the reduced bytes belong to.

    payload: bytes by the number of ranks that reduced them. sizes: elements of `rest`, and of `tied` and `untied`
    layers' experts. Where experts and the rest are reduced by groups of their own size, it says which is which. Else
    one bucket has both: of the rest, and of untied layers, each element comes once each time, and what is left is the
    tied layers'. expert_ranks: None for experts that are reduced with the rest.
    """
    once = {kind: count * width * times for kind, count in sizes.items()}
    if expert_ranks is None or expert_ranks == ranks:
        rest = min(once.get("rest", 0), payload[ranks])
        experts = payload[ranks] - rest
    else:
        rest, experts = payload[ranks], payload[expert_ranks]
    untied = min(once.get("untied", 0), experts)
    return ReductionBytes(experts=experts, tied_layers=experts - untied, rest=rest)


def tied_layers_of(topology: TieTopology) -> frozenset[int]:
    """The layers that share their experts with another."""
    return frozenset(layer for bank in topology.banks if bank.is_tied for layer in bank.layers)


class _Reductions(TorchDispatchMode):
    """Counts reductions while a contender is in its backward pass, by the size of their group."""

    def __init__(self, contender: Contender):
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no types
        self._phases = contender.phases
        # The backward pass of a dispatcher that gathers is a reduction, too.
        self._others = {
            parallel_state.get_expert_model_parallel_group().group_name,
            parallel_state.get_tensor_model_parallel_group().group_name,
        }
        self.payload: Counter[int] = Counter()
        self.width = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        is_reduction = func.namespace == "c10d" and func._opname in _REDUCTIONS
        if is_reduction and self._phases.current in ("backward", "reduce"):
            self._count(args)
        return func(*args, **(kwargs or {}))

    def _count(self, arguments: Sequence[Any]) -> None:
        group = next(filter(None, map(_process_group, arguments)))
        if group.size() == 1 or group.group_name in self._others:
            return
        given = [_tensors(argument) for argument in arguments[:2]]
        self.payload[group.size()] += max(sum(tensor.nbytes for tensor in tensors) for tensors in given)
        self.width = max(self.width, *(tensor.itemsize for tensors in given for tensor in tensors))


def _process_group(argument: Any) -> torch.distributed.ProcessGroup | None:
    if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
        return torch.distributed.ProcessGroup.unbox(argument)
    return None


def _tensors(argument: Any) -> list[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        return [argument]
    return [tensor for item in argument for tensor in _tensors(item)] if isinstance(argument, (list, tuple)) else []


@contextmanager
def _counting_gathers(contender: Contender) -> Iterator[Counter[str]]:
    names = {id(parameter): name for name, parameter in contender.parameters.items()}
    found: Counter[str] = Counter()
    original = getattr(PartitionedParameterCoordinator, _GATHER)

    def counted(self: Any, params: Any, *rest: Any, **more: Any) -> Any:
        missing = [param for param in params if param.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        found.update(names[id(param)] for param in missing if id(param) in names)
        return original(self, params, *rest, **more)

    setattr(PartitionedParameterCoordinator, _GATHER, counted)
    try:
        yield found
    finally:
        setattr(PartitionedParameterCoordinator, _GATHER, original)


def _per_group(gathers: Counter[str], contender: Contender, tied: TieTopology) -> float:
    in_groups = tied_layers_of(tied)
    groups = sum(bank.is_tied for bank in tied.banks)
    ours = [name for name in contender.parameters if is_expert(name) and layer_of(name) in in_groups]
    # Fused or not, a layer's experts are so many tensors, each gathered by itself.
    tensors_of_a_layer = max(Counter(map(layer_of, ours)).values())
    total = sum(gathers[name] for name in ours)
    return total / tensors_of_a_layer / groups / contender.engine.gradient_accumulation_steps()
