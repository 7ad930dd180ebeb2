"""Starts training the way people do: a config file, a launcher, and nothing else in the environment."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.processes import run_to_end

ROOT = Path(__file__).parents[2]

# What the deepspeed launcher itself prints, before it imports anything of ours: it finds no GPU and no hostfile,
# and tells of the processes it starts and ends.
_LAUNCHER = re.compile(r"\[[-\d]+ [:,\d]+\] \[[A-Z]+\] \[(real_accelerator|runner|launch)\.py:")


@dataclass(frozen=True)
class Corpus:
    """Two data sets with one tokenizer of 320 pieces, by prefix."""

    a: Path
    b: Path
    tokenizer: Path


@dataclass(frozen=True)
class Finished:
    """A process that has ended, with standard output and error in one text."""

    code: int
    output: str

    @property
    def our_lines(self) -> list[str]:
        """All that was printed but by the launcher."""
        return [line for line in self.output.splitlines() if line.strip() and not _LAUNCHER.match(line)]


def config_values(corpus: Corpus, run_dir: Path) -> dict[str, Any]:
    """Five tiny layers, all but the first tied; two processes with two experts each, two micro-batches a step."""
    return {
        "model": {
            "num_layers": 5,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_moe_experts": 4,
            "moe_router_topk": 2,
            "moe_ffn_hidden_size": 32,
            "moe_aux_loss_coeff": 0.01,
            "moe_z_loss_coeff": 0.001,
        },
        "tie": {"group_size": 4, "skip_first": 1, "skip_last": 0},
        "parallel": {"expert_model_parallel_size": 2},
        "data": {
            "train": str(corpus.a),
            "tokenizer": str(corpus.tokenizer),
            "split": [0.9, 0.1],
            "num_workers": 1,
        },
        "train": {
            "run_dir": str(run_dir),
            "steps": 12,
            "seq_length": 32,
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "log_every": 1,
            "eval_every": 5,
            "eval_steps": 2,
            "precision": "fp32",
        },
        "optimizer": {"lr": 5e-3, "min_lr": 5e-4, "warmup_steps": 3},
        "checkpoint": {"save_every": 0},
        "monitor": {"every": 5, "expensive_every": 10},
        "deepspeed": {"zero_optimization": {"stage": 1}},
    }


def write_config(directory: Path, corpus: Corpus) -> Path:
    """A config file in `directory`, whose run directory is `directory / "run"`."""
    path = directory / "config.yaml"
    path.write_text(json.dumps(config_values(corpus, directory / "run")))  # JSON is YAML
    return path


def environment(**more: str) -> Mapping[str, str]:
    """No DS_ACCELERATOR, no RANK; the programs that users have; one thread, for the sake of the machine."""
    kept = {name: os.environ[name] for name in ("HOME", "PATH", "TORCH_EXTENSIONS_DIR") if name in os.environ}
    return kept | {"OMP_NUM_THREADS": "1"} | more


def deepspeed_command(config: Path, *overrides: str, module: str = "megatron_tied.pretrain") -> list[str]:
    """Two processes under the deepspeed launcher, on a port of their own."""
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2"]
    port = ["--master_port", str(free_port())]
    return [*launcher, *port, "--module", module, "--config", str(config), *overrides]


def alone_command(config: Path, *overrides: str) -> list[str]:
    """One process without a launcher."""
    return [sys.executable, "-m", "megatron_tied.pretrain", "--config", str(config), *overrides]


def finish(command: list[str], *, timeout: float = 600, **environment_variables: str) -> Finished:
    """Run `command` to its end."""
    done = run_to_end(command, cwd=ROOT, env=environment(**environment_variables), timeout=timeout)
    return Finished(done.returncode, done.stdout)


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The objects of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def series(run_dir: Path, name: str) -> list[float]:
    """One metric over the steps that have it."""
    return [line[name] for line in read_metrics(run_dir) if name in line]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
