"""Where a DeepSpeed optimizer holds weights, gradients and states: all that differs between the ZeRO stages.

DeepSpeed keeps them in flat tensors, cut at places that depend on the number of ranks and on the stage. A *holder* is
a tensor that the inner optimizer updates, and the key of its state: a parameter, or such a flat tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron_tied.engine.engine import TiedMoEEngine
from megatron_tied.engine.exchange_blocks import Run

Group = dict[str, Any]
# A torch.nn.Parameter with the attributes that DeepSpeed gives it, which no stub knows.
Parameter = Any


class Holdings:
    """Those of ZeRO 0: every rank's optimizer updates the parameters themselves."""

    def __init__(self, engine: TiedMoEEngine):
        self.optimizer = engine.optimizer

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The optimizer that does the work, and has the states."""
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def by_group(self) -> Iterator[tuple[Group, list[torch.Tensor]]]:
        """The inner optimizer's groups, with the holders of each."""
        yield from ((group, group["params"]) for group in self.inner.param_groups)

    def held(self, name: str, parameter: Parameter) -> tuple[Run, torch.Tensor] | None:
        """The run of a trained parameter that is updated here, and its holder; None where other ranks do it all."""
        return Run(name, 0, parameter.numel(), 0), parameter

    def gradient(self, parameter: Parameter) -> torch.Tensor:
        """The reduced gradient of that run, which may be padded, between the last backward pass and the step."""
        gradient: torch.Tensor = parameter.grad
        return gradient

    def frozen(self, parameter: Parameter) -> tuple[int, torch.Tensor] | None:
        """Where in a frozen parameter this rank's part begins, and that part, 1-D; None where it has none."""
        return 0, parameter.detach().view(-1)

    def spread_over(self, holder: torch.Tensor) -> torch.distributed.ProcessGroup | None:
        """The ranks over which that of which `holder` has a part is spread; None: nothing is spread."""
        return None

    def publish(self) -> None:
        """Make the model's parameters those that the optimizer now holds; a collective. Nothing to do here."""


class PartitionedStates(Holdings):
    """Those of ZeRO 1 and 2: each rank has a part of each group, in float32."""

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The optimizer that does the work, and has the states."""
        optimizer: torch.optim.Optimizer = self.optimizer.optimizer
        return optimizer

    def held(self, name: str, parameter: Parameter) -> tuple[Run, torch.Tensor] | None:
        """The run of a trained parameter that is updated here, and its holder; None where other ranks do it all."""
        # What DeepSpeed made for its universal checkpoints.
        if (mapping := parameter._hp_mapping) is None:
            return None
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        holder = self.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        return Run(name, here.start, here.numel, there.start), holder

    def gradient(self, parameter: Parameter) -> torch.Tensor:
        """The reduced gradient of that run, between the last backward pass and the step."""
        gradient: torch.Tensor = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
        return gradient

    def spread_over(self, holder: torch.Tensor) -> torch.distributed.ProcessGroup | None:
        """The ranks among which the group of `holder` is divided."""
        index = _index_of(holder, self.optimizer.single_partition_of_fp32_groups)
        group: torch.distributed.ProcessGroup = self.optimizer.real_dp_process_group[index]
        return group

    def publish(self) -> None:
        """Make the model's parameters those that the optimizer now holds; a collective."""
        self.optimizer.update_lp_params()


class PartitionedParameters(PartitionedStates):
    """Those of ZeRO 3: each rank has a part of each parameter, padded at the last ranks."""

    def by_group(self) -> Iterator[tuple[Group, list[torch.Tensor]]]:
        """The inner optimizer's groups, with the holders of each."""
        # The groups are empty: ZeRO 3 lends them these for the duration of a step.
        for index, holder in enumerate(self.optimizer.fp32_partitioned_groups_flat):
            yield self.inner.param_groups[self.optimizer.sub_group_to_group_id[index]], [holder]

    def held(self, name: str, parameter: Parameter) -> tuple[Run, torch.Tensor] | None:
        """The run of a trained parameter that is updated here, and its holder; None where there is padding only."""
        group, offset, padded = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        start, numel = self._part(parameter, padded)
        return (Run(name, start, numel, offset), self._flat[group]) if numel > 0 else None

    def gradient(self, parameter: Parameter) -> torch.Tensor:
        """The reduced gradient of that run, padded, a copy."""
        gradient: torch.Tensor = self.optimizer.get_local_fp32_grad_for_param(parameter)
        return gradient

    def frozen(self, parameter: Parameter) -> tuple[int, torch.Tensor] | None:
        """Where in a frozen parameter this rank's part begins, and that part, 1-D; None where it has none."""
        part = parameter.ds_tensor
        start, numel = self._part(parameter, part.ds_numel)
        return (start, part.detach().view(-1).narrow(0, 0, numel)) if numel > 0 else None

    def spread_over(self, holder: torch.Tensor) -> torch.distributed.ProcessGroup | None:
        """The ranks among which the parameters of `holder` are divided."""
        first = self.optimizer.fp16_groups[_index_of(holder, self._flat)][0]
        group: torch.distributed.ProcessGroup = first.ds_process_group
        return group

    def publish(self) -> None:
        """Make the model's parameters those that the optimizer now holds; a collective."""
        optimizer = self.optimizer
        # As ZeRO 3 does when it loads a checkpoint of its own (`_rigid_load_state_dict`).
        for index, flat in enumerate(self._flat):
            if flat.numel():
                optimizer.fp16_partitioned_groups_flat[index].data.copy_(flat.data)
            optimizer._unflatten_partitioned_parameters(index)
        if kept := optimizer.persistent_parameters:
            kept[0].partition(kept)
            kept[0].all_gather(kept)

    @property
    def _flat(self) -> list[torch.Tensor]:
        flat: list[torch.Tensor] = self.optimizer.fp32_partitioned_groups_flat
        return flat

    def _part(self, parameter: Parameter, padded: int) -> tuple[int, int]:
        """Where this rank's part of a parameter begins, and its elements without padding, at most 0 if it has none."""
        start = self.optimizer._get_param_partition_rank(parameter) * padded
        return start, min(padded, parameter.ds_numel - start)


def holdings(engine: TiedMoEEngine) -> Holdings:
    """Those of an engine, by its ZeRO stage."""
    stage = engine.zero_optimization_stage()
    return (Holdings, PartitionedStates, PartitionedStates, PartitionedParameters)[stage](engine)


def _index_of(holder: torch.Tensor, holders: list[torch.Tensor]) -> int:
    return next(index for index, each in enumerate(holders) if each is holder)
