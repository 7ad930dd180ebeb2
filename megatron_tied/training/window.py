"""The figures of the steps between two log lines."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from megatron_tied.engine.engine import TiedMoEEngine
from megatron_tied.engine.muon import IS_MUON
from megatron_tied.engine.partitions import state_bytes
from megatron_tied.monitor.moe_losses import take_moe_losses
from megatron_tied.monitor.step_time import StepTime
from megatron_tied.planner.hardware import GB
from megatron_tied.platform import device
from megatron_tied.training.config import RunConfig
from megatron_tied.training.evaluation import average_over_ranks


class Window:
    """Collects the steps since the last log line without waiting for the device; `close` makes their metrics."""

    def __init__(self, config: RunConfig, engine: TiedMoEEngine, constants: Mapping[str, float], step_time: StepTime):
        self._engine = engine
        self._constants = constants
        self._step_time = step_time
        self._steps = config.train.steps
        self._tokens_per_step = config.train.global_batch_size * config.train.seq_length
        self._moe_layers = len(config.topology().moe_layers)
        self._start()

    def _start(self) -> None:
        self._losses: list[torch.Tensor] = []
        self._learning_rates: Mapping[str, float] = {}
        self._began = time.perf_counter()

    def add(self, loss: torch.Tensor, learning_rates: Mapping[str, float]) -> None:
        """Note one step's loss on this rank, a detached scalar, and its learning rates, as `rates_of` tells them."""
        self._losses.append(loss)
        self._learning_rates = learning_rates

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What goes on in this context, an evaluation or writing, is left out of the speed."""
        paused = time.perf_counter()
        yield
        self._began += time.perf_counter() - paused

    def close(self, step: int, parts: Mapping[str, float]) -> dict[str, float]:
        """Means over the window's steps and all ranks, and what only the last step has. A collective.

        `parts` are those of the losses that were added, `lm_loss` among them; empty where they are that alone.
        loss: the training objective; lm_loss: cross entropy, and its perplexity; aux_loss, z_loss: per MoE layer,
        without their coefficients; grad_norm: before clipping, last step; loss_scale: fp16's; lr and
        `lr/...`: see `rates_of`; tokens: seen so far; memory_gb: peak of CUDA memory on this rank, or
        resident memory on a CPU host, in 10^9 bytes; memory_fullest_gb: that of the rank with most; states_gb: weights
        and optimizer states; time/...: see `StepTime`; and the constants.
        """
        engine, steps = self._engine, len(self._losses)
        added = average_over_ranks(torch.stack(self._losses).mean())
        parts = parts or {"lm_loss": added}
        moe = take_moe_losses(engine.module.config, self._moe_layers, steps * engine.gradient_accumulation_steps())
        seconds = time.perf_counter() - self._began
        metrics = {
            "loss": added + moe.objective,
            **parts,
            "perplexity": math.exp(min(parts["lm_loss"], 700.0)),
            "aux_loss": moe.aux_loss,
            "z_loss": moe.z_loss,
            "grad_norm": float(engine.get_global_grad_norm()),
            **({"loss_scale": engine.loss_scale_now()} if engine.fp16_enabled() else {}),
            **self._learning_rates,
            "tokens": step * self._tokens_per_step,
            "tokens_per_second": steps * self._tokens_per_step / seconds,
            "step_seconds": seconds / steps,
            "eta_seconds": (self._steps - step) * seconds / steps,
            **_memory(),
            "states_gb": state_bytes(engine) / GB,
            **self._step_time.take(steps, seconds),
            **self._constants,
        }
        self._start()
        return metrics


def rates_of(groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The learning rates of parameter groups: each one's as `lr/...`, and as `lr` that which is divided for tied ones.

    With Muon, `lr` is Muon's.
    """
    divided = [group for group in groups if group.get(IS_MUON, True)]
    # A model all of whose layers are tied has no other.
    least = min(divided, key=lambda group: group["lr_divisor"])
    return {"lr": least["lr"] * least["lr_divisor"]} | {f"lr/{group['label']}": group["lr"] for group in groups}


def _memory() -> dict[str, float]:
    if not torch.cuda.is_available():
        here = {"memory_gb": psutil.Process().memory_info().rss / GB}
    else:
        here = {
            "memory_gb": torch.cuda.max_memory_allocated() / GB,
            "memory_allocated_gb": torch.cuda.memory_allocated() / GB,
            "memory_reserved_gb": torch.cuda.memory_reserved() / GB,
        }
    fullest = torch.tensor(here["memory_gb"], device=device())
    torch.distributed.all_reduce(fullest, op=torch.distributed.ReduceOp.MAX)
    return {**here, "memory_fullest_gb": fullest.item()}
