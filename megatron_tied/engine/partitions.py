"""What this rank's optimizer holds, as pieces of the model's parameters, at any ZeRO stage.

DeepSpeed keeps weights and optimizer states in flat tensors, cut at places that depend on the number of ranks and on
the stage. Here each of them is told as a run of elements of one parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch

from megatron_tied.engine.engine import TiedMoEEngine
from megatron_tied.engine.exchange_blocks import Run
from megatron_tied.engine.muon import IS_MUON, MOMENTUM

WEIGHT = "weight"


@dataclass(frozen=True)
class Fragment:
    """Elements `start` and following of a flattened parameter of this rank.

    `tensors` holds the weights that the optimizer updates, under "weight" (float32 at every ZeRO stage), and its
    states under its own names: 1-D views of equal length, writing to which changes the optimizer. A frozen parameter
    has weights alone, in the model's precision.
    """

    parameter: str
    start: int
    tensors: dict[str, torch.Tensor]


def fragments(engine: TiedMoEEngine) -> list[Fragment]:
    """Everything that this rank's optimizer holds, and what it has of frozen parameters: at stages 0 to 2 all of it."""
    updated = [
        Fragment(run.parameter, run.start, {key: run.of(flat) for key, flat in _flat_tensors(engine, holder)})
        for run, holder in runs(engine)
    ]
    return [*updated, *_frozen(engine)]


def weights(engine: TiedMoEEngine, parameters: Iterable[str]) -> dict[str, torch.Tensor]:
    """The elements of each of these parameters that this rank's optimizer updates, 1-D views, float32."""
    wanted = set(parameters)
    return {run.parameter: run.of(holder.detach().view(-1)) for run, holder in runs(engine) if run.parameter in wanted}


def gradients(engine: TiedMoEEngine, parameters: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The reduced gradients of what `weights` returns, 1-D; between the last backward pass and the step.

    With fp16 they carry the loss scale. One at a time: at stage 3 each is a copy.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    model = dict(engine.module.named_parameters())
    if torch.cuda.is_available():
        # Offloaded gradients are copied to the host without waiting; DeepSpeed waits before it reads them itself.
        torch.cuda.synchronize()
    for name, part in weights(engine, parameters).items():
        parameter = model[name]
        if stage == 0:
            gradient = parameter.grad
        elif stage < 3:
            gradient = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
        else:
            gradient = optimizer.get_local_fp32_grad_for_param(parameter)
        # Stage 3 pads the last rank's part.
        yield name, gradient.reshape(-1)[: part.numel()]


def optimizer_scalars(engine: TiedMoEEngine) -> dict[str, float]:
    """The optimizer states that are numbers, such as Adam's step count: the same for all parameters."""
    found: dict[str, float] = {}
    for holder in _holders(engine):
        found |= {key: float(value) for key, value in _state(engine, holder).items() if not _is_like(value, holder)}
    return found


def state_bytes(engine: TiedMoEEngine) -> int:
    """Bytes of the storages of weights, fp32 masters and optimizer states on this rank's device, each counted once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in _states(engine)
        if tensor.device.type == engine.device.type
    }
    return sum(storages.values())


def _states(engine: TiedMoEEngine) -> Iterator[torch.Tensor]:
    for parameter in engine.module.parameters():
        # At stage 3 the parameter itself is empty between its uses.
        yield getattr(parameter, "ds_tensor", parameter)
    yield from _holders(engine)
    for state in _inner(engine).state.values():
        yield from filter(torch.is_tensor, state.values())


def create_optimizer_states(engine: TiedMoEEngine, keys: Iterable[str], scalars: dict[str, float]) -> None:
    """Give every parameter those of the states `keys` that its optimizer has, of zeros where there are none, and the
    `scalars`."""
    keys = list(keys)
    for group, holders in _holders_by_group(engine):
        # Muon's have its momentum and no count of steps; in a run without it no group says whose it is.
        is_muon = group.get(IS_MUON, False)
        for holder in holders:
            state = _state(engine, holder)
            for key in keys:
                if (key == MOMENTUM) == is_muon:
                    state.setdefault(key, torch.zeros_like(holder, memory_format=torch.contiguous_format))
            if not is_muon:
                state |= {key: torch.tensor(value, dtype=torch.float32) for key, value in scalars.items()}


def publish_weights(engine: TiedMoEEngine) -> None:
    """Make the model's parameters those that the optimizer now holds; a collective."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        # As ZeRO 3 does when it loads a checkpoint of its own (`_rigid_load_state_dict`).
        for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            if flat.numel():
                optimizer.fp16_partitioned_groups_flat[index].data.copy_(flat.data)
            optimizer._unflatten_partitioned_parameters(index)
        if kept := optimizer.persistent_parameters:
            kept[0].partition(kept)
            kept[0].all_gather(kept)


def runs(engine: TiedMoEEngine) -> Iterator[tuple[Run, torch.Tensor]]:
    """The runs of parameters that this rank's optimizer updates, each with the flat tensor that holds it."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if stage == 0:
            yield Run(name, 0, parameter.numel(), 0), parameter
        elif stage < 3:
            # What DeepSpeed made for its universal checkpoints; None: other ranks hold all of the parameter.
            if (mapping := parameter._hp_mapping) is not None:
                here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                holder = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
                yield Run(name, here.start, here.numel, there.start), holder
        else:
            group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = optimizer._get_param_partition_rank(parameter) * padded
            numel = min(padded, parameter.ds_numel - start)
            if numel > 0:
                yield Run(name, start, numel, offset), optimizer.fp32_partitioned_groups_flat[group]


def _frozen(engine: TiedMoEEngine) -> Iterator[Fragment]:
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            continue
        if engine.zero_optimization_stage() < 3:
            yield Fragment(name, 0, {WEIGHT: parameter.detach().view(-1)})
            continue
        part = parameter.ds_tensor
        start = engine.optimizer._get_param_partition_rank(parameter) * part.ds_numel
        numel = min(part.ds_numel, parameter.ds_numel - start)
        if numel > 0:
            yield Fragment(name, start, {WEIGHT: part.detach().view(-1).narrow(0, 0, numel)})


def _holders(engine: TiedMoEEngine) -> list[torch.Tensor]:
    """The tensors that the inner optimizer updates, as keys of its state."""
    return [holder for _, holders in _holders_by_group(engine) for holder in holders]


def _holders_by_group(engine: TiedMoEEngine) -> Iterator[tuple[dict[str, Any], list[torch.Tensor]]]:
    groups = _inner(engine).param_groups
    if engine.zero_optimization_stage() < 3:
        yield from ((group, group["params"]) for group in groups)
        return
    # Its groups are empty: ZeRO 3 lends them these for the duration of a step.
    for index, holder in enumerate(engine.optimizer.fp32_partitioned_groups_flat):
        yield groups[engine.optimizer.sub_group_to_group_id[index]], [holder]


def _inner(engine: TiedMoEEngine) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = engine.optimizer
    return optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def _state(engine: TiedMoEEngine, holder: torch.Tensor) -> dict[str, torch.Tensor | float]:
    state: dict[str, torch.Tensor | float] = _inner(engine).state[holder]
    return state


def _flat_tensors(engine: TiedMoEEngine, holder: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    yield WEIGHT, holder.detach().view(-1)
    for key, value in _state(engine, holder).items():
        if _is_like(value, holder):
            yield key, value.view(-1)


def _is_like(value: torch.Tensor | float, holder: torch.Tensor) -> TypeGuard[torch.Tensor]:
    return torch.is_tensor(value) and value.shape == holder.shape
