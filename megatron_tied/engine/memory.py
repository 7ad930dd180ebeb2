"""What the weights and optimizer states of an engine really take on this rank."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_tied.engine.engine import TiedMoEEngine

# Where DeepSpeed's optimizers keep fp32 weights: ZeRO 1 and 2, ZeRO 3.
_MASTERS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")


def state_bytes(engine: TiedMoEEngine) -> int:
    """Bytes of the storages of weights, fp32 masters and optimizer moments on this rank's device, each counted once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in _states(engine)
        if tensor.device.type == engine.device.type
    }
    return sum(storages.values())


def _states(engine: TiedMoEEngine) -> Iterator[torch.Tensor]:
    for parameter in engine.module.parameters():
        # At stage 3 the parameter itself is empty between its uses.
        yield getattr(parameter, "ds_tensor", parameter).data
    optimizer = engine.optimizer
    for name in _MASTERS:
        yield from getattr(optimizer, name, ())
    base = getattr(optimizer, "optimizer", optimizer)
    for state in base.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))
