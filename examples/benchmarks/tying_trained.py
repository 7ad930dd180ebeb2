"""Tying a trained model: the held-out loss before, right after tying by each method, and after a short recovery.

    python examples/benchmarks/tying_trained.py examples/quickstart.yaml WORK_DIR [section.field=value ...]

Trains the config's model untied, ties it with `megatron-tied convert`, and trains on with the untied model as teacher,
all in WORK_DIR and on one process; what is there is used again. Prints a table as Markdown. About ten minutes on two
CPU cores.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from megatron_tied.checkpoint.directory import resolve
from megatron_tied.convert.convert import Conversion, convert
from megatron_tied.convert.live_model import logits, model_of_checkpoint
from megatron_tied.data.datasets import build_datasets
from megatron_tied.inference.processes import one_process
from megatron_tied.topology import TieConfig
from megatron_tied.training.config import RunConfig
from megatron_tied.training.config_file import load_config
from megatron_tied.training.startup import split_argument

GROUP_SIZES = (2, 4)
METHODS = ("owner", "average", "matched")
# For the first training and for recoveries: short steps, and nothing but training.
SHORT = [
    "parallel.expert_model_parallel_size=1",
    "train.seq_length=128",
    "train.micro_batch_size=8",
    "train.eval_every=0",
    "train.log_every=50",
    "monitor.every=0",
    "monitor.expensive_every=0",
    "monitor.tensorboard=false",
    "checkpoint.save_every=1000000",
]
UNTIED = ["tie.group_size=1", "train.steps=300", "optimizer.lr=1e-3", "optimizer.warmup_steps=50"]
RECOVERY = ["train.steps=30", "optimizer.lr=3e-4", "optimizer.warmup_steps=5"]
HELD_OUT_SEQUENCES = 128
BATCH = 16


def main(path: str, work_directory: str, *overrides: str) -> None:
    """Train, tie, recover, and print the table."""
    work = Path(work_directory)
    work.mkdir(parents=True, exist_ok=True)
    untied = work / "untied"
    train(path, untied, *UNTIED, *overrides)
    config = load_config(path, [*SHORT, f"train.run_dir={untied}", *overrides])
    with one_process():
        before = held_out_loss(config, untied)
    print(f"untied: held-out loss {before:.3f}\n")
    print("| group size | method | right after tying | more than untied | after recovery | more than untied |")
    print("|---|---|---|---|---|---|")
    for size in GROUP_SIZES:
        for method in METHODS:
            tied, recovered = work / f"tied_{size}_{method}", work / f"recovered_{size}_{method}"
            if not tied.exists():
                tie(config, untied, tied, size, method)
            teacher = [f"train.init_from={tied}", f"distill.teacher={untied}"]
            train(path, recovered, f"tie.group_size={size}", *RECOVERY, *teacher, *overrides)
            with one_process():
                after, later = (held_out_loss(config, directory) for directory in (tied, recovered))
            cells = [str(size), method, f"{after:.3f}", f"+{after - before:.3f}", f"{later:.3f}"]
            print(f"| {' | '.join(cells)} | {later - before:+.3f} |", flush=True)


def train(path: str, directory: Path, *overrides: str) -> None:
    """A run of one process in `directory`, or the rest of it."""
    command = [sys.executable, "-m", "megatron_tied.pretrain", "--config", path, *SHORT, *overrides]
    subprocess.run([*command, f"train.run_dir={directory}"], check=True, stdout=sys.stderr)


def tie(config: RunConfig, untied: Path, directory: Path, size: int, method: str) -> None:
    """`megatron-tied convert`, with text for `matched`."""
    asked = Conversion(
        source_format="megatron-tied",
        target_format="megatron-tied",
        input=untied,
        output=directory,
        tie=TieConfig(group_size=size),
        method=method,
        calibration=Path(config.data.train) if method == "matched" else None,
        verify=False,
    )
    convert(asked, say=lambda line: print(line, file=sys.stderr))


def held_out_loss(config: RunConfig, directory: Path) -> float:
    """Mean cross entropy per token on the same held-out sequences, whichever model; inside `one_process`."""
    datasets = build_datasets(
        train=config.data.train,
        validation=config.data.validation,
        split=split_argument(config),
        cache_dir=config.data.cache_dir,
        seq_length=config.train.seq_length,
        train_samples=1,
        validation_samples=HELD_OUT_SEQUENCES,
        seed=config.train.seed,
    )
    samples = [datasets.validation[index] for index in range(HELD_OUT_SEQUENCES)]
    tokens, labels = (torch.stack([sample[name] for sample in samples]) for name in ("tokens", "labels"))
    model = model_of_checkpoint(resolve(directory))
    losses = [
        torch.nn.functional.cross_entropy(logits(model, some).flatten(0, 1), answers.flatten())
        for some, answers in zip(tokens.split(BATCH), labels.split(BATCH), strict=True)
    ]
    return torch.stack(losses).mean().item()


if __name__ == "__main__":
    main(*sys.argv[1:])
