"""The sections of a config file but `model` and `tie`, key by key; a key's docstring is its line in the reference."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from megatron_tied.monitor.alerts import AlertSettings
from megatron_tied.training.fields import Count, CountFromZero, NonNegative, PathName, Section


def _parse_blend(value: object) -> str | tuple[float | str, ...]:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and len(value) % 2 == 0:
        weights, prefixes = value[::2], value[1::2]
        if all(map(_is_weight, weights)) and all(isinstance(prefix, str) and prefix for prefix in prefixes):
            return tuple(value)
    raise ValueError("must be a path prefix or a blend [WEIGHT, PREFIX, WEIGHT, PREFIX, ...], weights > 0")


def _is_weight(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


Blend = Annotated[str | tuple[float | str, ...], BeforeValidator(_parse_blend)]


class ParallelConfig(Section):
    """Over how many ranks a layer's experts, its matrices, and the layers themselves are spread."""

    expert_model_parallel_size: Count = 1
    """Ranks that share the experts of a bank (EP); divides the number of experts and that of processes."""
    tensor_model_parallel_size: Count = 1
    """Ranks that share attention, vocabulary and dense layers, with sequence parallelism; experts stay whole."""
    pipeline_model_parallel_size: Count = 1
    """1: pipelines are for Megatron-LM's own scripts."""
    context_parallel_size: Count = 1
    """1: not supported."""


class DataConfig(Section):
    """What is read. Prefixes are those that `prepare-data` wrote, without .bin and .idx."""

    train: Blend
    """What is trained on: a prefix, or a blend `[0.75, PREFIX_A, 0.25, PREFIX_B]`."""
    validation: Blend | None = None
    """What held-out losses are computed on, likewise; null: the second share of `split`."""
    split: tuple[NonNegative, NonNegative] = (0.99, 0.01)
    """Shares of `train` for training and for validation; without effect if `validation` is given."""
    tokenizer: PathName | None = None
    """A SentencePiece model, a Hugging Face directory or `tokenizer.json`, or `tiktoken:NAME`: that of the data."""
    cache_dir: PathName | None = None
    """Where dataset indices are kept; null: beside the data."""
    num_workers: CountFromZero = 2
    """Processes of each rank that read ahead; 0: the rank reads."""


class TrainConfig(Section):
    """How long, how much at once, in which precision. Batch sizes are in sequences."""

    run_dir: PathName
    """Where config, metrics, checkpoints and summary go."""
    steps: Count = 1000
    """Optimizer steps of the whole run."""
    seq_length: Count = 1024
    """Tokens of a sequence."""
    micro_batch_size: Count = 1
    """Sequences that a rank computes at once."""
    global_batch_size: Count = 32
    """Sequences of a step, of all ranks; a multiple of micro_batch_size x data parallel ranks."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1234
    """Of the initial weights, the order of samples and dropout."""
    log_every: Count = 10
    """Steps between log lines."""
    eval_every: CountFromZero = 100
    """Steps between evaluations; 0: none."""
    eval_steps: Count = 10
    """Global batches of one evaluation."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of weights and activations; optimizer states are fp32."""
    check_consistency_every: CountFromZero = 0
    """Steps between comparisons of what ranks must hold in common (0: none); a difference ends the run."""
    resume: PathName = "auto"
    """auto: after the newest sound checkpoint of run_dir, if it has one; never: refuse a run_dir that has been used; or
    like auto, but begin from the checkpoint at this path, or the latest of the run there."""
    init_from: PathName | None = None
    """A checkpoint whose weights, and nothing else, a new run begins with."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """After a step that was discarded, its gradient norm not being finite; fp16 always goes on: it has a loss scale."""
    liveness_timeout: NonNegative = 60.0
    """Seconds of silence after which a rank counts as lost and all others end (0: they wait for it); a rank that dies
    is noticed at once. A cut of the network of less than half as long is survived."""


class DistillConfig(Section):
    """A teacher that a run learns from besides its data, such as the model that it was before its layers were tied."""

    teacher: PathName | None = None
    """A checkpoint, or a run, whose model differs in its banks only; its weights do not change."""
    kl: NonNegative = 0.1
    """Weighs KL(teacher || student), a mean over tokens, beside the cross entropy."""
    moe_output: NonNegative = 0.1
    """Weighs how far the outputs of MoE layers are from the teacher's: the mean squared difference over the mean
    square, a mean over layers."""


class CheckpointConfig(Section):
    """When the whole state of a run is written to run_dir/checkpoints. The last step always is, unless never."""

    save_every: CountFromZero = 500
    """Steps between checkpoints; 0: never."""
    keep_last: Count = 2
    """How many of the newest are kept."""
    keep_every: CountFromZero = 0
    """Steps that this divides are kept for good; 0: none."""
    async_save: bool = True
    """Write in the background while training goes on; costs a copy in host memory."""


class WandbConfig(Section):
    """A Weights & Biases run that gets the same metrics; its package must be installed."""

    project: PathName
    """Of the run."""
    name: PathName | None = None
    """Of the run; null: W&B draws one."""
    entity: PathName | None = None
    """The user or team; null: the default of the login."""
    mode: Literal["online", "offline"] = "online"
    """offline: written to run_dir, for `wandb sync`."""


class MonitorConfig(Section):
    """What is watched, and where it goes besides metrics.jsonl. Losses and speed come every `train.log_every` steps."""

    every: CountFromZero = 10
    """Steps between looks at the routing of a global batch; 0: none."""
    expensive_every: CountFromZero = 100
    """Steps between looks at banks' norms, the gradients of their use sites, and heat maps, a multiple of `every`;
    0: none."""
    dead_window: Count = 500
    """An expert that no batch looked at has given a token for so many steps counts as dead."""
    tensorboard: bool = True
    """Into run_dir/tensorboard, or where DeepSpeed's own `tensorboard` section says."""
    wandb: WandbConfig | None = None
    """A Weights & Biases run; null: none."""
    alerts: AlertSettings = AlertSettings()
    """Bounds beyond which a line with ALERT is logged; null in place of one: no such alert."""
