"""Training and validation samples through Megatron-Core's GPT data sets, blended and split."""

# ruff: noqa: E402  (Megatron-Core must be imported after the host is prepared)
from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.distributed as dist
from torch.utils.data import Dataset

from megatron_tied import platform
from megatron_tied.data.checks import (
    Blend,
    BlendSpec,
    Span,
    cache_directory,
    check_data,
    parse_blend,
    parse_split,
)
from megatron_tied.data.metadata import with_suffix
from megatron_tied.data.sampler import Sample
from megatron_tied.errors import ConfigError, Problem
from megatron_tied.exchange import AnyJson, gather_json, on_rank_0
from megatron_tied.files import sync

platform.prepare()

try:
    from megatron.core.datasets import helpers
except ImportError as error:
    raise ImportError(
        "Megatron-Core's compiled data helpers are missing; install it from its wheel: "
        "pip install --force-reinstall --no-deps --only-binary :all: megatron-core"
    ) from error
from megatron.core import __version__ as megatron_core_version
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

__all__ = ["Datasets", "build_datasets", "check_data"]

# Of a blend's data sets Megatron-Core builds this share more samples than the weights ask for.
_SURPLUS = 0.005
_ABANDONED_SECONDS = 7 * 24 * 3600


class Datasets(NamedTuple):
    """Samples are dicts of `tokens`, `labels`, `position_ids` (int64 [s]) and `loss_mask` (float32 [s])."""

    train: Dataset[Sample]
    validation: Dataset[Sample] | None


def build_datasets(
    *,
    train: BlendSpec,
    validation: BlendSpec | None,
    split: str | None,
    cache_dir: str | Path | None,
    seq_length: int,
    train_samples: int,
    validation_samples: int,
    seed: int,
) -> Datasets:
    """Build the data sets of a run; collective over all ranks when torch.distributed is initialised.

    Each has at least the samples asked for, going over its data as often as that takes; the order depends on
    `seed` and on the number of samples. Validation comes from `validation`, or from `train` by `split`, or is
    None. The arguments must have passed `check_data`. Global rank 0 builds the index cache; `ConfigError` is
    raised on every rank when it cannot be written, or when a rank does not see it.
    """
    blend = parse_blend(train, "data.train")
    spans = parse_split(split)
    held_out, held_out_span = blend, spans.validation
    if validation is not None:
        held_out, held_out_span = parse_blend(validation, "data.validation"), (0.0, 1.0)
    roles = [(Split.train, blend, spans.train, train_samples)]
    if held_out_span[1] > held_out_span[0] and validation_samples:
        roles.append((Split.valid, held_out, held_out_span, validation_samples))
    key = _cache_key(roles, seq_length, seed)
    with _index_cache(cache_directory(cache_dir, blend), key) as cache:
        built = [_build(*role, cache=cache, seq_length=seq_length, seed=seed) for role in roles]
    return Datasets(built[0], built[1] if len(built) > 1 else None)


def _build(
    role: Split, blend: Blend, span: Span, samples: int, *, cache: Path, seq_length: int, seed: int
) -> Dataset[Sample]:
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=([str(prefix) for prefix in blend.prefixes], blend.weights),
        split="1",
        path_to_cache=str(cache),
        tokenizer=_NoTokenizer(),
        mid_level_dataset_surplus=_surplus(blend, samples),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    config.split_matrix = [span if part is role else None for part in Split]
    sizes = [samples if part is role else 0 for part in Split]
    built: Dataset[Sample] = _Builder(GPTDataset, sizes, lambda: True, config).build()[role.value]
    return built


class _NoTokenizer:
    """Megatron-Core asks the tokenizer only for separators to mask or reset at, and we do neither."""

    vocab_size = None
    eod = None
    unique_identifiers = None


class _Builder(BlendedMegatronDatasetBuilder):
    """Also blends in a process that has no process group."""

    @staticmethod
    def build_generic_dataset(
        cls: Callable[..., object], is_built_on_rank: Callable[[], bool], synchronize_ranks: bool, *args: object
    ) -> object:
        if cls is BlendedDataset and not dist.is_initialized():
            cls = _LoneBlend
        return BlendedMegatronDatasetBuilder.build_generic_dataset(cls, is_built_on_rank, synchronize_ranks, *args)


class _LoneBlend(BlendedDataset):
    """Megatron-Core's own, given a cache directory, asks for the rank: an error without a process group."""

    def _build_indices(self) -> tuple[np.ndarray, np.ndarray]:
        return _blend_indices(np.array(self.weights), self.size)


def _blend_indices(weights: np.ndarray, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """For each sample of a blend its data set (int16 [samples]) and its number there (int64 [samples])."""
    data_set = np.zeros(samples, np.int16)
    sample = np.zeros(samples, np.int64)
    helpers.build_blending_indices(data_set, sample, weights, len(weights), samples, False)
    return data_set, sample


def _surplus(blend: Blend, samples: int) -> float:
    """The surplus with which no data set of a blend runs out.

    Megatron-Core rounds each data set's share up, then draws by weight from the larger sum. It draws a data
    set at most weight * sum + 1 times, which exceeds its share by the usual surplus only for few samples.
    """
    if blend.weights is None:
        return _SURPLUS
    weights = np.array(blend.weights) / sum(blend.weights)
    if len(weights) + 1 / weights.min() <= _SURPLUS * samples:
        return _SURPLUS
    shares = np.ceil(samples * weights).astype(np.int64)
    drawn = np.bincount(_blend_indices(weights, int(shares.sum()))[0], minlength=len(weights))
    return max(_SURPLUS, float((drawn / shares).max()) - 1)


def _cache_key(roles: list[tuple[Split, Blend, Span, int]], seq_length: int, seed: int) -> str:
    """Megatron-Core's own key does not notice that the files of a prefix were replaced; this one does."""
    parts: list[object] = [megatron_core_version, seq_length, seed]
    for role, blend, span, samples in roles:
        parts.append((role.name, blend.weights, span, samples))
        for prefix in blend.prefixes:
            stat = with_suffix(prefix, ".idx").stat()
            parts.append((str(prefix), stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@contextmanager
def _index_cache(root: Path, key: str) -> Iterator[Path]:
    """The directory for Megatron-Core's index files, which has its final name only when they are complete.

    Megatron-Core takes a file that exists for a finished one, even after a crash.
    """
    # The key of the first rank: on the disk of another host the same files have other times.
    ready, place = map(Path, _on_rank_0(root, lambda: _ready_and_place(root, key)))
    if not all(_gathered(place.is_dir())):
        raise ConfigError(_problem(root, "must be in a file system that all ranks share"))
    if foreign := _on_rank_0(root, lambda: _foreign_file(place)):
        valid = f"must hold what Megatron-Core wrote; {foreign} is no NumPy array: remove the directory"
        raise ConfigError(_problem(place, valid))
    try:
        yield place
    except BaseException:
        if place != ready and (not dist.is_initialized() or dist.get_rank() == 0):
            shutil.rmtree(place, ignore_errors=True)
        raise
    if place != ready:
        _gathered(True)  # every rank has opened its files
        _on_rank_0(root, lambda: _publish(place, ready))


def _ready_and_place(root: Path, key: str) -> tuple[str, str]:
    """Where the index files of this key belong, and where they are, or are to be built."""
    ready = root / key
    return str(ready), str(ready if ready.is_dir() else _fresh_directory(root, key))


def _foreign_file(cache: Path) -> str | None:
    """A file that is no array. Megatron-Core would have NumPy unpickle it, which runs what it says."""
    return next((file.name for file in sorted(cache.glob("*.npy")) if not _is_array(file)), None)


def _is_array(file: Path) -> bool:
    try:
        return isinstance(np.load(file, mmap_mode="r", allow_pickle=False), np.ndarray)
    except (ValueError, EOFError):
        return False


def _fresh_directory(root: Path, key: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for directory in root.glob(".*.building"):
        if time.time() - directory.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(directory, ignore_errors=True)
    fresh = root / f".{key}.{uuid.uuid4().hex}.building"
    fresh.mkdir()
    return fresh


def _publish(place: Path, ready: Path) -> None:
    for file in place.iterdir():
        sync(file)
    sync(place)
    # Another run may have been faster; the ranks of this one have its own files open.
    if not ready.exists():
        os.rename(place, ready)
        sync(ready.parent)


def _problem(root: Path, valid: str) -> Problem:
    return Problem("data.cache_dir", str(root), valid)


def _on_rank_0(root: Path, action: Callable[[], AnyJson]) -> AnyJson:
    """Global rank 0 acts in the cache directory `root`; every rank returns its result, as JSON, or raises its error."""

    def told(reason: str) -> ConfigError:
        return ConfigError(_problem(root, f"must be a directory that can be written ({reason})"))

    return on_rank_0(action, (OSError,), told)


def _gathered(value: bool) -> list[bool]:
    return gather_json(value) if dist.is_initialized() else [value]
