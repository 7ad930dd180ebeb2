"""What this rank's optimizer holds, as pieces of the model's parameters, at any ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeGuard

import torch

from megatron_tied.engine.engine import TiedMoEEngine
from megatron_tied.engine.exchange_blocks import Run
from megatron_tied.engine.holdings import holdings
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
    held, model = holdings(engine), dict(engine.module.named_parameters())
    if torch.cuda.is_available():
        # Offloaded gradients are copied to the host without waiting; DeepSpeed waits before it reads them itself.
        torch.cuda.synchronize()
    for name, part in weights(engine, parameters).items():
        yield name, held.gradient(model[name]).reshape(-1)[: part.numel()]


def optimizer_scalars(engine: TiedMoEEngine) -> dict[str, float]:
    """The optimizer states that are numbers, such as Adam's step count: the same for all parameters."""
    found: dict[str, float] = {}
    for _, holders in holdings(engine).by_group():
        for holder in holders:
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
    held = holdings(engine)
    for _, holders in held.by_group():
        yield from holders
    for state in held.inner.state.values():
        yield from filter(torch.is_tensor, state.values())


def create_optimizer_states(engine: TiedMoEEngine, keys: Iterable[str], scalars: dict[str, float]) -> None:
    """Give every parameter those of the states `keys` that its optimizer has, of zeros where there are none, and the
    `scalars`."""
    keys = list(keys)
    for group, holders in holdings(engine).by_group():
        # Muon's have its momentum and no count of steps; in a run without it no group says whose it is.
        is_muon = group.get(IS_MUON, False)
        for holder in holders:
            state = _state(engine, holder)
            for key in keys:
                if (key == MOMENTUM) == is_muon:
                    state.setdefault(key, torch.zeros_like(holder, memory_format=torch.contiguous_format))
            if not is_muon:
                for key, value in scalars.items():
                    # Fused kernels read it where the weights are.
                    state[key] = torch.tensor(value, dtype=torch.float32, device=holder.device)


def runs(engine: TiedMoEEngine) -> Iterator[tuple[Run, torch.Tensor]]:
    """The runs of parameters that this rank's optimizer updates, each with the flat tensor that holds it."""
    held = holdings(engine)
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad and (found := held.held(name, parameter)):
            yield found


def _frozen(engine: TiedMoEEngine) -> Iterator[Fragment]:
    held = holdings(engine)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad and (found := held.frozen(parameter)):
            start, part = found
            yield Fragment(name, start, {WEIGHT: part})


def _state(engine: TiedMoEEngine, holder: torch.Tensor) -> dict[str, torch.Tensor | float]:
    state: dict[str, torch.Tensor | float] = holdings(engine).inner.state[holder]
    return state


def _flat_tensors(engine: TiedMoEEngine, holder: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    yield WEIGHT, holder.detach().view(-1)
    for key, value in _state(engine, holder).items():
        if _is_like(value, holder):
            yield key, value.view(-1)


def _is_like(value: torch.Tensor | float, holder: torch.Tensor) -> TypeGuard[torch.Tensor]:
    return torch.is_tensor(value) and value.shape == holder.shape
