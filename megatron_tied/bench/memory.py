"""What a contender's states take on this rank, and what a step takes at its peak."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from megatron_tied.bench.contender import Contender
from megatron_tied.bench.plain_engine import PlainEngine
from megatron_tied.engine.partitions import state_bytes

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_KIB = 1024


def states_of(contender: Contender, gradients: int) -> dict[str, int]:
    """Bytes on this rank's device: weights, the most that gradients were, masters and optimizer states."""
    engine = contender.engine
    weights = storage_bytes(_parts(contender))
    if isinstance(engine, PlainEngine):
        total = storage_bytes([*_parts(contender), *engine.state_tensors()])
    else:
        total = state_bytes(engine)
    return {"weights": weights, "gradients": gradients, "optimizer": total - weights}


def gradient_bytes(contender: Contender) -> int:
    """Bytes of the gradients that are there now: whole ones, and what ZeRO keeps."""
    found = [parameter.grad for parameter in contender.parameters.values()]
    optimizer = contender.engine.optimizer
    averaged = getattr(optimizer, "averaged_gradients", None) or {}
    found += [tensor for of_group in averaged.values() for tensor in _flat(of_group)]
    found.append(getattr(optimizer, "grad_partitions_flat_buffer", None))
    return used_bytes(tensor for tensor in found if tensor is not None)


def used_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of `tensors`, what several of them show once: of a bucket with room for more, that of those in it."""
    shown: dict[int, tuple[int, set[tuple[int, int]]]] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        shown.setdefault(storage.data_ptr(), (storage.nbytes(), set()))[1].add((tensor.data_ptr(), tensor.nbytes))
    return sum(min(room, sum(size for _, size in parts)) for room, parts in shown.values())


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages of `tensors`, each once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def updated_elements(contender: Contender) -> int:
    """How many weights this rank's AdamW updates."""
    optimizer = contender.engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    states: Iterable[Mapping[str, torch.Tensor]] = inner.state.values()
    return sum(state["exp_avg"].numel() for state in states)


def _parts(contender: Contender) -> list[torch.Tensor]:
    return [getattr(parameter, "ds_tensor", parameter) for parameter in contender.parameters.values()]


def _flat(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)


class PeakOfProcess:
    """How far the resident memory of this process has grown at its highest, since it was made; Linux only."""

    def __init__(self) -> None:
        with suppress(OSError):  # then the peak of the imports counts, which is seldom higher
            _CLEAR.write_text(_RESET_PEAK)
        self._before = _status("VmRSS")

    def bytes(self) -> int | None:
        """None where the system does not tell."""
        highest = _status("VmHWM")
        return None if highest is None or self._before is None else highest - self._before


def _status(name: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    values = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return next((int(value) * _KIB for value in values), None)
