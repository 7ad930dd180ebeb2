"""One benchmark on this rank: contenders in turns, then what their steps consist of, then what the machine could do."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from statistics import median
from typing import Any

import torch

from megatron_tied.bench.comparison import Comparison
from megatron_tied.bench.contender import Contender, elements
from megatron_tied.bench.job import HUGGINGFACE, OF_TRANSFORMERS, TIED, Job
from megatron_tied.bench.kernels import kernel_shares
from megatron_tied.bench.machine import hardware, software
from megatron_tied.bench.memory import PeakOfProcess, gradient_bytes, states_of, updated_elements
from megatron_tied.bench.plain_engine import PlainEngine
from megatron_tied.bench.progress import Done, Progress
from megatron_tied.bench.results import Result, Row
from megatron_tied.bench.roofline import Ceilings, measure_ceilings
from megatron_tied.bench.tokens import random_batches
from megatron_tied.bench.traffic import measure_traffic
from megatron_tied.bench.turns import WARM_UP_STEPS, Built, build, peak_of, steps_of_a_turn, take_turns
from megatron_tied.planner.compute import flops_per_token
from megatron_tied.training.vocabulary import vocabulary_size

# Reads weight, gradient and two states, writes weight and states, of four bytes each.
_ADAMW_BYTES = 7 * 4


def measure(job: Job, progress: Progress) -> Result:
    """Everything about `job`, as this rank sees it. A collective; process groups must exist."""
    batches = random_batches(job.config)
    ceilings = measure_ceilings(job.config.train.precision)
    built = build(job, batches, job.contenders, lambda what: progress(Done(what, 0, job.rounds)))
    progress(Done("warming up", 0, job.rounds))
    steps = steps_of_a_turn(job, built.contenders, batches)
    for contender in built.contenders:
        contender.phases.take(1, 0.0)
    seconds: dict[str, list[float]] = {contender.name: [] for contender in built.contenders}
    for round_, of_round in enumerate(take_turns(built.contenders, batches, rounds=job.rounds, steps=steps)):
        for name, time in of_round.items():
            seconds[name].append(time)
        progress(Done("taking turns", round_ + 1, job.rounds))
    progress(Done("looking inside the steps", job.rounds, job.rounds))
    ceilings = ceilings.or_better(measure_ceilings(job.config.train.precision))
    found = {
        contender.name: _examine(job, contender, built, seconds[contender.name], steps, ceilings)
        for contender in built.contenders
    }
    return {
        "config": job.config.model_dump(mode="json"),
        "topology": job.config.topology().describe(),
        "ranks": job.ranks,
        "rounds": job.rounds,
        "steps_of_a_turn": steps,
        "tokens_of_a_step": _tokens(job),
        "threads": torch.get_num_threads(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "hardware": hardware(),
        "software": software(),
        "ceilings": {
            "gemm_flops_per_second": ceilings.flops_per_second,
            "copy_bytes_per_second": ceilings.bytes_per_second,
        },
        "contenders": found,
        "left_out": built.left_out,
        "comparisons": {
            name: Comparison.of(seconds[TIED], seconds[name]).to_json() for name in seconds if name != TIED
        },
    }


def measure_alone(job: Job, name: str) -> int | None:
    """The peak memory of the contender `name`, in a process that has built nothing before; None where it cannot be
    told. A collective."""
    batches = random_batches(job.config)
    if name in OF_TRANSFORMERS:
        with suppress(ImportError):  # told when it is built
            importlib.import_module("transformers.models.auto.modeling_auto")
    peak = PeakOfProcess()
    built = build(job, batches, [name], lambda what: None)
    for contender in built.contenders:
        contender.run(batches, WARM_UP_STEPS - 1)
    return peak.bytes() if built.contenders else None


def _examine(job: Job, contender: Contender, built: Built, seconds: list[float], steps: int, ceilings: Ceilings) -> Row:
    batches = random_batches(job.config)
    step = partial(contender.run, batches, 1)
    typical = median(seconds)
    # First: what follows is timed, too.
    phases = contender.phases.take(steps * len(seconds), steps * sum(seconds))
    gradients = _MostGradients(contender)
    traffic = measure_traffic(contender, gradients.during(step), job.config.topology())
    peak = peak_of(step, built.resident[contender.name])
    flops = model_flops(job, contender.name) / job.ranks / typical
    states = states_of(contender, gradients.most)
    return {
        "parameters": sum(map(elements, contender.parameters.values())),
        "first_loss": contender.first_loss,
        "seconds": seconds,
        "seconds_of_a_step": typical,
        "tokens_per_second": _tokens(job) / typical,
        "phases": phases,
        "states": states | {"total": sum(states.values())},
        "peak_memory": peak,
        "reduction_bytes": traffic.reductions.to_json(),
        "bank_gathers": traffic.gathers,
        "kernels": kernel_shares(step),
        "flops_per_second": flops,
        "share_of_gemm_ceiling": flops / ceilings.flops_per_second,
        "share_of_copy_bandwidth_in_optimizer": _share_of_copies(job, contender, phases["optimizer"], ceilings),
    }


def _share_of_copies(job: Job, contender: Contender, seconds: float, ceilings: Ceilings) -> float | None:
    """How near AdamW comes to a copy's speed; None for Muon, which mostly multiplies."""
    if job.config.optimizer.name != "adamw":
        return None
    return _ADAMW_BYTES * updated_elements(contender) / seconds / ceilings.bytes_per_second


class _MostGradients:
    """The most that gradients take at the two moments when they are complete: before reduction, and after it."""

    def __init__(self, contender: Contender):
        self._contender = contender
        self.most = 0

    def during(self, step: Callable[[], object]) -> Callable[[], None]:
        """`step`, watched."""

        def watched() -> None:
            contender, engine = self._contender, self._contender.engine
            usual, contender.phases.when_reduced = contender.phases.when_reduced, self._look
            if not isinstance(engine, PlainEngine):
                engine.allreduce_gradients = partial(self._look_and, engine.allreduce_gradients)
            try:
                step()
            finally:
                contender.phases.when_reduced = usual
                if not isinstance(engine, PlainEngine):
                    del engine.allreduce_gradients

        return watched

    def _look(self) -> None:
        self.most = max(self.most, gradient_bytes(self._contender))

    def _look_and(self, reduce: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._look()
        return reduce(*args, **kwargs)


def _tokens(job: Job) -> int:
    return job.config.train.global_batch_size * job.config.train.seq_length


def model_flops(job: Job, contender: str) -> int:
    """Of a step on all ranks; tying changes them only where a tied bank has more experts, and its routers with it."""
    config = job.config_of(TIED if contender == HUGGINGFACE else contender)
    each = flops_per_token(config.model, config.topology(), config.train.seq_length, vocabulary_size(config))
    return each.training * _tokens(job)
