"""What is compared: a model, the engine that trains it, and how it turns a micro-batch into a loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch

from megatron_tied.bench.phases import Phases
from megatron_tied.bench.plain_engine import PlainEngine
from megatron_tied.bench.roofline import synchronize
from megatron_tied.training.evaluation import Batch
from megatron_tied.training.loop import train_step

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

Engine: TypeAlias = "DeepSpeedEngine | PlainEngine"


class CannotRunHereError(Exception):
    """A contender cannot be built on this host; the message says why."""


class Contender:
    """One of those that take turns, on this rank.

    reductions: how often a step reduces each gradient. shards_experts: whether experts are spread over the expert
    parallel ranks. first_loss: mean cross entropy of the first step on this rank, once it is done.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        objective: Callable[[Engine, Batch], torch.Tensor],
        phases: Phases,
        *,
        reductions: int,
        shards_experts: bool = True,
    ):
        self.name = name
        self.engine = engine
        self.objective = objective
        self.phases = phases
        self.reductions = reductions
        self.shards_experts = shards_experts
        self.first_loss = math.nan
        self.steps_done = 0

    def run(self, batches: Callable[[int], Sequence[Batch]], steps: int) -> float:
        """Train `steps` steps on the batches of the steps that come next; returns the seconds of all ranks' work."""
        work = [batches(self.steps_done + step) for step in range(steps)]
        synchronize()
        torch.distributed.barrier()
        began = time.perf_counter()
        losses = [self._step(iter(of_step)) for of_step in work]
        synchronize()
        torch.distributed.barrier()
        seconds = time.perf_counter() - began
        if self.steps_done == 0:
            self.first_loss = losses[0].item()
        self.steps_done += steps
        return seconds

    def _step(self, batches: Iterator[Batch]) -> torch.Tensor:
        return train_step(self.engine, self.objective, batches, self.phases)

    @property
    def parameters(self) -> Mapping[str, torch.nn.Parameter]:
        """Those of the model, each once, by name; at ZeRO 3 their elements are elsewhere."""
        return dict(self.engine.module.named_parameters())


def elements(parameter: torch.nn.Parameter) -> int:
    """How many numbers a parameter has, partitioned by ZeRO 3 or not."""
    count: int = getattr(parameter, "ds_numel", parameter.numel())
    return count


def is_expert(name: str) -> bool:
    """Whether a parameter belongs to routed experts; Megatron-Core and Hugging Face call them alike."""
    return ".experts." in name


def layer_of(name: str) -> int:
    """The number, from 0, of the layer that a parameter belongs to."""
    return int(name.partition("layers.")[2].partition(".")[0])
