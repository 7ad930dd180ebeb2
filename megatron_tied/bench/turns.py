"""Contenders side by side on the same ranks: built, warmed up, and timed in turns."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from megatron_tied.bench.autoep import build_autoep
from megatron_tied.bench.contender import CannotRunHereError, Contender
from megatron_tied.bench.engines import build_megatron_core, build_ours
from megatron_tied.bench.huggingface import build_huggingface
from megatron_tied.bench.job import AUTOEP, HUGGINGFACE, MEGATRON_CORE, TIED, UNTIED, Job
from megatron_tied.exchange import gather_json
from megatron_tied.training.evaluation import Batch

Batches = Callable[[int], Sequence[Batch]]

_OURS = (TIED, UNTIED)
_BUILDERS: dict[str, Callable[[Job], Contender]] = {
    HUGGINGFACE: build_huggingface,
    MEGATRON_CORE: build_megatron_core,
    AUTOEP: build_autoep,
}
# After the step that makes optimizer states: ZeRO 3 follows the trace of an earlier step.
WARM_UP_STEPS = 3
_SECONDS_OF_A_TURN, _MOST_STEPS = 0.5, 20


class Built(NamedTuple):
    """The contenders that run here, why the others do not, and what those that do keep allocated on the GPU."""

    contenders: list[Contender]
    left_out: dict[str, str]
    resident: dict[str, int]


def build(job: Job, batches: Batches, names: Sequence[str], say: Callable[[str], object]) -> Built:
    """Build each of `names` and let it train one step; a peer that cannot is left out, on every rank. A collective."""
    built = Built([], {}, {})
    for name in names:
        say(f"building {name}")
        before = allocated()
        outcome = _try(job, name, batches)
        # One that fails on some ranks only would keep the others waiting.
        reasons = [reason for reason in gather_json(outcome if isinstance(outcome, str) else "") if reason]
        if reasons or isinstance(outcome, str):
            built.left_out[name] = reasons[0]
            del outcome
            gc.collect()
            continue
        built.contenders.append(outcome)
        built.resident[name] = allocated() - before
    return built


def _try(job: Job, name: str, batches: Batches) -> Contender | str:
    """The contender after its first step, or why there is none."""
    try:
        contender = build_ours(name, job) if name in _OURS else _BUILDERS[name](job)
        contender.run(batches, 1)
        return contender
    except CannotRunHereError as error:
        return str(error)
    except Exception as error:  # whatever another package's code does: the others are measured all the same
        if name in _OURS:
            raise
        return " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]])


def steps_of_a_turn(job: Job, contenders: Sequence[Contender], batches: Batches) -> int:
    """Warms all up; returns how many steps a turn has, the same on all ranks."""
    fastest = math.inf
    for contender in contenders:
        for _ in range(WARM_UP_STEPS - 1):
            fastest = min(fastest, contender.run(batches, 1))
    wanted = min(max(math.ceil(_SECONDS_OF_A_TURN / fastest), 1), _MOST_STEPS)
    return job.steps or gather_json(wanted)[0]


def take_turns(
    contenders: Sequence[Contender], batches: Batches, *, rounds: int, steps: int
) -> Iterator[dict[str, float]]:
    """Seconds a step of each contender, round by round; each round begins with another one."""
    gc.collect()
    gc.freeze()  # what imports and building have made is not to be looked at in the middle of a step
    for round_ in range(rounds):
        first = round_ % len(contenders)
        order = [*contenders[first:], *contenders[:first]]
        yield {contender.name: contender.run(batches, steps) / steps for contender in order}


def allocated() -> int:
    """Bytes that are allocated on the GPU; 0 without one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def peak_of(step: Callable[[], object], resident: int) -> int | None:
    """The most that is allocated during `step` by a contender that keeps `resident` bytes, without the others; None
    without a GPU."""
    if not torch.cuda.is_available():
        step()
        return None
    torch.cuda.reset_peak_memory_stats()
    before = allocated()
    step()
    return torch.cuda.max_memory_allocated() - before + resident
