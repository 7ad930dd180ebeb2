"""How long saving keeps the training loop from going on: in the foreground, and in the background.

    torchrun --standalone --nproc_per_node 2 examples/benchmarks/save_stall.py examples/quickstart.yaml \
        model.vocab_size=4096 data.tokenizer=null

Trains on random tokens, saves after every fourth step into a temporary directory, and prints medians as Markdown.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from random_batches import random_batches

from megatron_tied.checkpoint.directory import CheckpointDirectory
from megatron_tied.checkpoint.manifest import Manifest
from megatron_tied.checkpoint.saver import Saver
from megatron_tied.engine.groups import initialize_model_parallel
from megatron_tied.exchange import gather_json
from megatron_tied.monitor.dead_experts import LastUse
from megatron_tied.platform import device
from megatron_tied.training.config_file import load_config
from megatron_tied.training.evaluation import LossFunction
from megatron_tied.training.loop import train_step
from megatron_tied.training.monitoring import Monitoring
from megatron_tied.training.run import build_engine
from megatron_tied.training.startup import join_processes
from megatron_tied.training.state import RunState

SAVES, STEPS_BETWEEN = 5, 4


def main(path: str, *overrides: str) -> None:
    """Measure both ways on the same engine; the first save of each is not counted."""
    config = load_config(path, overrides)
    join_processes()
    initialize_model_parallel(config.parallel.expert_model_parallel_size, config.parallel.tensor_model_parallel_size)
    engine, layout, figures = build_engine(config)
    monitoring = Monitoring(config, engine, last_use := LastUse(config.monitor.every))
    state, loss_function = RunState(config, engine, layout, last_use), LossFunction(device())
    group = torch.distributed.new_group(backend="gloo")
    made = tempfile.mkdtemp() if torch.distributed.get_rank() == 0 else None
    directory = CheckpointDirectory(Path(gather_json(made)[0]))
    blocked: dict[bool, list[float]] = {}
    step = 0
    for in_background in (False, True):
        saver = Saver(directory, group, in_background=in_background, keep_last=1, keep_every=0)
        for _ in range(SAVES + 1):
            for _ in range(STEPS_BETWEEN):
                train_step(engine, loss_function, iter(random_batches(config)), monitoring)
            step += STEPS_BETWEEN
            torch.distributed.barrier()
            began = time.perf_counter()
            saver.save(state.tensors(), state.manifest(step), state.expected())
            blocked.setdefault(in_background, []).append(time.perf_counter() - began)
        saver.wait()
        assert all(outcome.failure is None for outcome in saver.outcomes())
    if torch.distributed.get_rank() == 0:
        report(
            {key: statistics.median(times[1:]) for key, times in blocked.items()}, directory, step, figures["unique"]
        )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def report(seconds: dict[bool, float], directory: CheckpointDirectory, step: int, parameters: int) -> None:
    """A table on standard output."""
    size = sum(file.bytes for file in Manifest.read(directory.path(step)).files.values())
    print("| saving | training is blocked for | of the foreground's |")
    print("|---|---|---|")
    for in_background, name in ((False, "in the foreground"), (True, "in the background")):
        print(f"| {name} | {seconds[in_background]:.3f} s | {seconds[in_background] / seconds[False]:.0%} |")
    print(f"\n{size:,} bytes on disk, {size / parameters:.3f} for each of {parameters:,} parameters")


if __name__ == "__main__":
    main(*sys.argv[1:])
