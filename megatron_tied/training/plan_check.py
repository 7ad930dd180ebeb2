"""The plan of a run beside what is measured while it goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import psutil
import torch
from megatron.core.transformer.moe.experts import HAVE_TE

from megatron_tied.engine.engine import TiedMoEEngine
from megatron_tied.engine.partitions import state_bytes
from megatron_tied.errors import ConfigError
from megatron_tied.planner.hardware import GB, Hardware, load_hardware
from megatron_tied.planner.plan import Plan
from megatron_tied.training.config import RunConfig
from megatron_tied.training.planning import planned_layout, planned_subject

_GPUS = ("h100", "h200", "b200", "a100")
# Of a GPU that hardware.yaml does not know only the memory is read from the device: its speed is another.
_LIKE_UNKNOWN = "a100"


class PlanCheck:
    """Plans a run on the machine it runs on. Without a plan (options that cannot be counted) it says nothing."""

    def __init__(self, config: RunConfig, world_size: int):
        self._plan: Plan | None = None
        try:
            layout = planned_layout(config, world_size)
            if not torch.cuda.is_available():
                # There host memory is the device's.
                layout = replace(layout, offload_optimizer=False, offload_parameters=False)
            self._plan = planned_subject(config, _this_hardware()).plan(config.tie, layout)
        except ConfigError as error:
            self._reason = error.problems[0]

    @property
    def metrics(self) -> Mapping[str, float]:
        """The planned figures that are logged beside the measured ones; GB are 10^9 bytes."""
        if self._plan is None:
            return {}
        memory = self._plan.memory
        return {
            "planned_memory_gb": memory.tensors / GB,
            "planned_states_gb": (memory.states.weights + memory.states.optimizer) / GB,
            "planned_tokens_per_second": self._plan.tokens_per_second,
        }

    def line(self, engine: TiedMoEEngine, tokens_per_second: float) -> str:
        """Plan against measured, on this rank."""
        if self._plan is None:
            return f"no plan to compare with: {self._reason}"
        planned = self.metrics
        return (
            f"plan against measured: weights and optimizer states {planned['planned_states_gb']:.3f} GB, "
            f"measured {state_bytes(engine) / GB:.3f}; all tensors at the peak {planned['planned_memory_gb']:.3f} GB, "
            f"{_measured_peak()}; {planned['planned_tokens_per_second']:,.0f} tokens/s "
            f"by the figures of {self._plan.hardware.name} in hardware.yaml, measured {tokens_per_second:,.0f}"
        )


def _measured_peak() -> str:
    if torch.cuda.is_available():
        return f"measured {torch.cuda.max_memory_allocated() / GB:.3f}"
    # A CPU allocator keeps no peak, and untouched parts of buckets take no memory.
    return f"resident now {psutil.Process().memory_info().rss / GB:.3f} GB, with libraries, without untouched buckets"


def _this_hardware() -> Hardware:
    if not torch.cuda.is_available():
        return load_hardware("cpu")
    device = torch.cuda.get_device_name().lower()
    hardware = load_hardware(next((name for name in _GPUS if name in device), _LIKE_UNKNOWN))
    memory = torch.cuda.get_device_properties(0).total_memory / GB
    return hardware.model_copy(update={"memory_gb": memory, "fused_kernels": HAVE_TE})
