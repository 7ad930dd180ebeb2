"""What monitoring costs: steps without it, with it, and with all it does at its rarest, in turn in one run.

    torchrun --standalone --nproc_per_node 2 examples/benchmarks/monitoring.py examples/quickstart.yaml \
        model.vocab_size=4096 data.tokenizer=null

Trains on random tokens with metrics.jsonl and TensorBoard in a temporary directory, and prints medians as Markdown.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from random_batches import random_batches

from megatron_tied.engine.engine import TiedMoEEngine
from megatron_tied.engine.groups import initialize_model_parallel
from megatron_tied.layers.moe_layer import tied_layers
from megatron_tied.monitor.dead_experts import LastUse
from megatron_tied.monitor.sinks import JsonLinesSink, Sinks
from megatron_tied.monitor.tensorboard import TensorBoardSink
from megatron_tied.platform import device
from megatron_tied.run_directory import METRICS
from megatron_tied.training.config_file import load_config
from megatron_tied.training.evaluation import LossFunction
from megatron_tied.training.loop import train_step
from megatron_tied.training.monitoring import Monitoring
from megatron_tied.training.run import build_engine
from megatron_tied.training.sections import MonitorConfig
from megatron_tied.training.startup import join_processes

ROUNDS = 25
KINDS = ("off", "on", "observed", "examined")


class Off:
    """Stands where `Monitoring` stands, and does nothing."""

    def __init__(self, engine: TiedMoEEngine):
        self._routers = [layer.router for layer in tied_layers(engine.module)]

    def watching(self, step: int) -> AbstractContextManager[None]:
        """Also takes the observer off the routers."""
        self._watched = [router.__dict__.pop("routing") for router in self._routers]
        return nullcontext()

    def forward(self) -> AbstractContextManager[None]:
        return nullcontext()

    def phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def before_update(self) -> None:
        return None

    def finish(self, step: int) -> tuple[dict, dict]:
        """Puts the observer back."""
        for router, watched in zip(self._routers, self._watched, strict=True):
            router.routing = watched
        return {}, {}


def main(path: str, *overrides: str) -> None:
    """Time the four kinds of steps, in random order within each round; the first round is not counted."""
    config = load_config(path, overrides)
    join_processes()
    initialize_model_parallel(config.parallel.expert_model_parallel_size, config.parallel.tensor_model_parallel_size)
    engine, *_ = build_engine(config)
    on, off = Monitoring(config, engine, LastUse(config.monitor.every)), Off(engine)
    loss_function = LossFunction(device())
    settings = config.monitor
    # Of each kind a step that is one: 0 is a multiple of everything.
    numbers = {"off": 1, "on": 1, "observed": settings.every, "examined": settings.expensive_every}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    order = random.Random(0)
    with tempfile.TemporaryDirectory() as place, _sinks(Path(place)) as sinks:
        for round_ in range(ROUNDS + 1):
            for kind in order.sample(KINDS, len(KINDS)):
                step = round_ * settings.expensive_every * settings.every + numbers[kind]
                batches = iter(random_batches(config))
                torch.distributed.barrier()
                began = time.perf_counter()
                monitoring = off if kind == "off" else on
                with monitoring.watching(step):
                    train_step(engine, loss_function, batches, monitoring)
                metrics, tables = monitoring.finish(step)
                if metrics:
                    sinks.write(step, metrics)
                if tables:
                    sinks.write_tables(step, tables)
                torch.distributed.barrier()
                if round_ > 0:
                    seconds[kind].append(time.perf_counter() - began)
    if torch.distributed.get_rank() == 0:
        report(seconds, settings)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _sinks(directory: Path) -> Sinks:
    if torch.distributed.get_rank() != 0:
        return Sinks()
    return Sinks(JsonLinesSink(directory / METRICS), TensorBoardSink(directory / "tensorboard"))


def report(seconds: dict[str, list[float]], settings: MonitorConfig) -> None:
    """A table on standard output; differences are medians of those within a round."""
    usual = statistics.median(seconds["off"])

    def more(kind: str, than: str) -> float:
        return statistics.median(a - b for a, b in zip(seconds[kind], seconds[than], strict=True)) / usual

    shares = {"off": 1.0, "on": 1.0, "observed": 1 / settings.every, "examined": 1 / settings.expensive_every}
    print("| step | of all steps | median | more than without monitoring |")
    print("|---|---|---|---|")
    for kind in KINDS:
        print(f"| {kind} | {shares[kind]:.0%} | {statistics.median(seconds[kind]):.3f} s | {more(kind, 'off'):+.1%} |")
    total = more("on", "off") + more("observed", "on") * shares["observed"]
    total += more("examined", "observed") * shares["examined"]
    print(f"\nAll in all {total:+.2%} at monitor.every {settings.every}, expensive_every {settings.expensive_every}.")


if __name__ == "__main__":
    main(*sys.argv[1:])
