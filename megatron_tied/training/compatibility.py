"""May a run go on from a checkpoint that another config has written? Compared before any model is built."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_tied.checkpoint.loader import Checkpoint
from megatron_tied.errors import ConfigError, Problem
from megatron_tied.models.config import TRAINING_ONLY_FIELDS
from megatron_tied.training.config import RunConfig
from megatron_tied.training.config_file import parse_config

# What the order of samples follows from.
_DATA_KEYS = (("train", "seq_length"), ("train", "global_batch_size"), ("train", "seed"))


def config_of(checkpoint: Checkpoint) -> RunConfig:
    """The config that `checkpoint` was written with. Raises `ConfigError` where it is not valid here."""
    try:
        return parse_config(checkpoint.manifest.run)
    except ConfigError as error:
        valid = f"was written with a config that is not valid here: {error}"
        raise ConfigError(Problem(str(checkpoint.path), None, valid)) from None


def same_model_problems(config: RunConfig, other: RunConfig, checkpoint: str) -> list[Problem]:
    """Why the weights of a run with the config `other` are not those of this run's model."""
    return [*teacher_problems(config, other, checkpoint), *_tie_problems(config, other, checkpoint)]


def resume_problems(config: RunConfig, other: RunConfig, checkpoint: str) -> list[Problem]:
    """Why a run with the config `other` cannot be gone on with by this one: another model, or another order of data.

    The number of ranks and how the model is spread over them, the ZeRO stage, offload, precision, learning rates and
    whatever is only watched or written may all change.
    """
    return same_model_problems(config, other, checkpoint) or [
        *_data_problems(config, other, checkpoint),
        *_freeze_problems(config, other, checkpoint),
        *_optimizer_problems(config, other, checkpoint),
    ]


def objective_changes(config: RunConfig, other: RunConfig) -> list[str]:
    """Lines on what a run learns from, where that is not as in the config `other`, which it goes on from."""
    ours, theirs = config.distill, other.distill
    return [
        f"warning: distill.{key} was {getattr(theirs, key)!r} and is {getattr(ours, key)!r}: losses from here on are "
        f"of another objective"
        for key in type(ours).model_fields
        if getattr(ours, key) != getattr(theirs, key)
    ]


def teacher_problems(config: RunConfig, other: RunConfig, checkpoint: str) -> Iterator[Problem]:
    """Why a run with the config `other` is no teacher for this one; its banks may be others."""
    ours, theirs = config.model.model_dump(), other.model.model_dump()
    for key in sorted((ours.keys() | theirs.keys()) - TRAINING_ONLY_FIELDS):
        if ours.get(key) != theirs.get(key):
            yield Problem(f"model.{key}", ours.get(key), f"must be {theirs.get(key)!r}, as in {checkpoint}")


def _tie_problems(config: RunConfig, other: RunConfig, checkpoint: str) -> Iterator[Problem]:
    if config.model.num_layers != other.model.num_layers:
        return
    ours, theirs = config.topology(), other.topology()
    ours_shared, theirs_shared = (which.tie.share if which.shares_more else "experts" for which in (ours, theirs))
    if (ours.bank_of_layer, ours_shared) != (theirs.bank_of_layer, theirs_shared):
        yield Problem("tie", ours.describe(), f"must be {theirs.describe()}, as in {checkpoint}")
    elif (here := _experts_by_layer(config)) != (there := _experts_by_layer(other)):
        valid = f"must give {there} experts by layer, not {here}, as in {checkpoint}"
        yield Problem("tie.num_tied_experts", config.tie.num_tied_experts, valid)


def _experts_by_layer(config: RunConfig) -> list[int]:
    topology = config.topology()
    return [topology.num_experts(layer, config.model.num_moe_experts) for layer in topology.moe_layers]


def _data_problems(config: RunConfig, other: RunConfig, checkpoint: str) -> Iterator[Problem]:
    reason = f"as in {checkpoint}: another would change the order of samples; see train.init_from for a new run"
    for section, key in _DATA_KEYS:
        ours, theirs = getattr(getattr(config, section), key), getattr(getattr(other, section), key)
        if ours != theirs:
            yield Problem(f"{section}.{key}", ours, f"must be {theirs!r}, {reason}")
    ours, theirs = _share(config), _share(other)
    if ours != theirs:
        yield Problem("data.split", ours, f"must leave {theirs} of data.train for training, {reason}")
    # The paths may differ: data is copied to other machines. How much of each is read may not.
    if _weights(config.data.train) != _weights(other.data.train):
        yield Problem("data.train", config.data.train, f"must have the weights of {other.data.train!r}, {reason}")


def _freeze_problems(config: RunConfig, other: RunConfig, checkpoint: str) -> Iterator[Problem]:
    ours, theirs = sorted(set(config.frozen())), sorted(set(other.frozen()))
    if ours != theirs:
        valid = f"must be {theirs}, as in {checkpoint}, for what is frozen has no optimizer states; see train.init_from"
        yield Problem("optimizer.freeze", ours, valid)


def _optimizer_problems(config: RunConfig, other: RunConfig, checkpoint: str) -> Iterator[Problem]:
    if (ours := config.optimizer.name) != (theirs := other.optimizer.name):
        valid = f"must be {theirs}, as in {checkpoint}, whose states are of no use to another; see train.init_from"
        yield Problem("optimizer.name", ours, valid)


def _share(config: RunConfig) -> float:
    """Of data.train, what is trained on: all, if there is other data for validation."""
    if config.data.validation is not None:
        return 1.0
    first, second = config.data.split
    return first / (first + second)


def _weights(blend: str | tuple[float | str, ...]) -> tuple[float, ...]:
    return (1.0,) if isinstance(blend, str) else tuple(map(float, blend[::2]))
