"""The figures of the steps between two log lines."""

from __future__ import annotations

import time
from collections.abc import Mapping

import psutil
import torch

from megatron_tied.engine.engine import TiedMoEEngine
from megatron_tied.engine.partitions import state_bytes
from megatron_tied.monitor.moe_losses import take_moe_losses
from megatron_tied.planner.hardware import GB
from megatron_tied.training.config import RunConfig
from megatron_tied.training.evaluation import average_over_ranks


class Window:
    """Collects the steps since the last log line without waiting for the device; `close` makes their metrics."""

    def __init__(self, config: RunConfig, engine: TiedMoEEngine, planned: Mapping[str, float]):
        self._engine = engine
        self._planned = planned
        self._tokens_per_step = config.train.global_batch_size * config.train.seq_length
        self._moe_layers = len(config.topology().moe_layers)
        self._start()

    def _start(self) -> None:
        self._losses: list[torch.Tensor] = []
        self._began = time.perf_counter()

    def add(self, loss: torch.Tensor) -> None:
        """Note one step's loss on this rank, a detached scalar."""
        self._losses.append(loss)

    def pause(self, seconds: float) -> None:
        """Leave `seconds` that went into something else, such as an evaluation, out of the speed."""
        self._began += seconds

    def close(self, step: int, learning_rates: dict[str, float]) -> dict[str, float]:
        """Means over the window's steps and all ranks, and what only the last step has. A collective.

        loss: the training objective; lm_loss: cross entropy; aux_loss, z_loss: per MoE layer, without their
        coefficients; grad_norm: before clipping, last step; lr: of the untied weights, and one `lr/...` per group;
        tokens: seen so far; memory_gb: peak of CUDA memory on this rank, or resident memory on a CPU host, in 10^9
        bytes; states_gb: weights and optimizer states there; planned_...: what the planner said.
        """
        engine, steps = self._engine, len(self._losses)
        lm_loss = average_over_ranks(torch.stack(self._losses).mean())
        moe = take_moe_losses(engine.module.config, self._moe_layers, steps * engine.gradient_accumulation_steps())
        seconds = time.perf_counter() - self._began
        metrics = {
            "loss": lm_loss + moe.objective,
            "lm_loss": lm_loss,
            "aux_loss": moe.aux_loss,
            "z_loss": moe.z_loss,
            "grad_norm": float(engine.get_global_grad_norm()),
            "lr": learning_rates["dense"],
            **{f"lr/{label}": lr for label, lr in learning_rates.items()},
            "tokens": step * self._tokens_per_step,
            "tokens_per_second": steps * self._tokens_per_step / seconds,
            "step_seconds": seconds / steps,
            "memory_gb": _memory_bytes() / GB,
            "states_gb": state_bytes(engine) / GB,
            **self._planned,
        }
        self._start()
        return metrics


def _memory_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss
