from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_tied.data import datasets as room
from megatron_tied.data.datasets import Datasets, build_datasets
from megatron_tied.data.metadata import Index
from megatron_tied.data.tokenizer import SentencePieceTokenizer
from megatron_tied.errors import ConfigError
from tests.data.corpus import make_text, write_jsonl

MakeData = Callable[..., Path]
TEXTS = [make_text(100, seed) for seed in range(40)]
SEQ_LENGTH = 32


def build(train: Any, **changes: Any) -> Datasets:
    arguments = {"validation": None, "split": None, "cache_dir": None, "seq_length": SEQ_LENGTH}
    arguments |= {"train_samples": 20, "validation_samples": 10, "seed": 1}
    return build_datasets(train=train, **arguments | changes)


def tokens_of(dataset: Any, count: int | None = None) -> list[list[int]]:
    return [dataset[index]["tokens"].tolist() for index in range(count or len(dataset))]


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def caches(prefix: Path) -> list[Path]:
    return sorted((prefix.parent / "index_cache").iterdir())


def test_samples_go_once_over_the_documents(data_set: MakeData, tokenizer: SentencePieceTokenizer) -> None:
    dataset = build(data_set("a", TEXTS), train_samples=1).train
    stream = [token for text in TEXTS for token in [*tokenizer.encode(text), tokenizer.eod]]
    drawn = Counter(token for sample in tokens_of(dataset) for token in sample)
    assert len(dataset) == (len(stream) - 1) // SEQ_LENGTH
    assert not drawn - Counter(stream)
    sample = dataset[3]
    assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()
    assert sample["position_ids"].tolist() == list(range(SEQ_LENGTH))
    assert sample["loss_mask"].tolist() == [1.0] * SEQ_LENGTH
    assert {key: value.dtype for key, value in sample.items()} == {
        "tokens": torch.int64,
        "labels": torch.int64,
        "loss_mask": torch.float32,
        "position_ids": torch.int64,
    }


def test_the_order_depends_on_the_seed_alone(data_set: MakeData, tmp_path: Path) -> None:
    a = data_set("a", TEXTS)
    first = tokens_of(build(a).train)
    assert tokens_of(build(a, cache_dir=tmp_path / "elsewhere").train) == first
    assert tokens_of(build(a, seed=2).train) != first


@pytest.mark.parametrize("weights", [(0.75, 0.25), (3, 1)])
def test_a_blend_gives_the_mixture(data_set: MakeData, weights: tuple[float, float]) -> None:
    a, b = data_set("a", ["the router " * 400]), data_set("b", ["layer bank " * 400])
    dataset = build([weights[0], a, weights[1], b], train_samples=1000).train
    sources = [int(dataset[index]["dataset_id"]) for index in range(1000)]
    assert sources.count(0) == pytest.approx(750, abs=2)
    assert sources[:100].count(0) == pytest.approx(75, abs=2)
    only_a, only_b = build(a).train, build(b).train
    assert set(dataset[sources.index(0)]["tokens"].tolist()) <= {t for s in tokens_of(only_a) for t in s}
    assert set(dataset[sources.index(1)]["tokens"].tolist()) <= {t for s in tokens_of(only_b) for t in s}


def test_a_blend_of_one(data_set: MakeData) -> None:
    a = data_set("a", TEXTS)
    assert tokens_of(build([0.3, a]).train) == tokens_of(build(a).train)


@pytest.mark.parametrize("samples", [7, 10, 500])
def test_no_part_of_a_blend_runs_out(data_set: MakeData, samples: int) -> None:
    blend: list[float | Path] = [0.5, data_set("main", TEXTS[:1])]
    for number in range(10):
        blend += [0.05, data_set(f"part{number}", TEXTS[:1])]
    one_sample_an_epoch = Index.read(blend[1]).tokens - 1
    dataset = build(blend, train_samples=samples, seq_length=one_sample_an_epoch).train
    assert len(dataset) >= samples
    assert len(tokens_of(dataset)) == len(dataset)


def test_a_split_holds_out_the_last_documents(data_set: MakeData, tokenizer: SentencePieceTokenizer) -> None:
    texts = ["the router " * 50] * 30 + ["layer bank " * 50] * 10
    train, validation = build(data_set("a", texts), split="75,25,0")
    assert len(train) >= 20
    assert len(validation) >= 10
    first = {tokenizer.eod, *tokenizer.encode("the router the router ")}
    last = {tokenizer.eod, *tokenizer.encode("layer bank layer bank ")}
    assert {token for sample in tokens_of(train) for token in sample} <= first
    assert {token for sample in tokens_of(validation) for token in sample} <= last


def test_a_blend_is_split_too(data_set: MakeData) -> None:
    a, b = data_set("a", TEXTS), data_set("b", TEXTS)
    train, validation = build([0.75, a, 0.25, b], split="9,1", train_samples=100, validation_samples=40)
    assert [int(validation[index]["dataset_id"]) for index in range(40)].count(0) == pytest.approx(30, abs=1)
    assert len(train) >= 100


def test_validation_data_of_its_own(data_set: MakeData) -> None:
    a, b = data_set("a", ["the router " * 400]), data_set("b", ["layer bank " * 400])
    _, validation = build(a, validation=b)
    alone = {token for sample in tokens_of(build(b).train) for token in sample}
    assert {token for sample in tokens_of(validation, 10) for token in sample} <= alone


def test_no_validation(data_set: MakeData) -> None:
    a = data_set("a", TEXTS)
    assert build(a).validation is None
    assert build(a, split="1,0,0").validation is None
    assert build(a, validation=a, validation_samples=0).validation is None


def test_the_index_cache_is_used_again(data_set: MakeData, monkeypatch: pytest.MonkeyPatch) -> None:
    a = data_set("a", TEXTS)
    first = tokens_of(build(a).train)
    monkeypatch.setattr(np, "save", lambda *arguments, **options: pytest.fail("built again"))
    assert tokens_of(build(a).train) == first
    assert len(caches(a)) == 1


def test_an_unfinished_index_cache_is_not_used(data_set: MakeData, monkeypatch: pytest.MonkeyPatch) -> None:
    a = data_set("a", TEXTS)
    with monkeypatch.context() as patch:
        patch.setattr(room, "_publish", lambda *arguments: None)  # killed after building
        first = tokens_of(build(a).train)
    (abandoned,) = caches(a)
    for file in abandoned.iterdir():
        file.write_bytes(file.read_bytes()[:10])
    assert tokens_of(build(a).train) == first
    monkeypatch.setattr(room, "_ABANDONED_SECONDS", -1)
    build(a, seed=2)
    assert abandoned not in caches(a)


def test_a_failed_build_leaves_no_index_cache(data_set: MakeData, monkeypatch: pytest.MonkeyPatch) -> None:
    a = data_set("a", TEXTS)
    save = np.save

    def failing(path: str, *arguments: Any, **options: Any) -> None:
        if "sample_index" in path:
            raise OSError("no space left")
        save(path, *arguments, **options)

    monkeypatch.setattr(np, "save", failing)
    # Where a process group exists, Megatron-Core raises an Exception of its own from it.
    with pytest.raises(Exception, match=r"no space left|Failed to write dataset materials"):
        build(a)
    assert caches(a) == []


@pytest.mark.parametrize("write", ["pickle", "array of objects", "empty file"])
def test_a_pickle_in_the_index_cache_is_not_run(data_set: MakeData, tmp_path: Path, write: str) -> None:
    a = data_set("a", TEXTS)
    build(a)
    index = next(caches(a)[0].glob("*shuffle_index.npy"))
    trap = Trap(tmp_path / "sprung")
    if write == "array of objects":
        np.save(index, np.array([trap], dtype=object), allow_pickle=True)
    else:
        index.write_bytes(pickle.dumps(trap) if write == "pickle" else b"")
    with pytest.raises(ConfigError, match=rf"data.cache_dir = .*{index.name} is no NumPy array: remove the directory"):
        build(a)
    assert not (tmp_path / "sprung").exists()


def test_replaced_data_gets_a_new_index_cache(data_set: MakeData, tmp_path: Path, model: Path) -> None:
    from megatron_tied.data.prepare import prepare_data

    a = data_set("a", TEXTS)
    before = tokens_of(build(a).train)
    prepare_data([write_jsonl(tmp_path / "a.jsonl", TEXTS[::-1])], a, tokenizer=model, overwrite=True)
    after = tokens_of(build(a).train)
    assert after != before
    assert after == tokens_of(build(a, cache_dir=tmp_path / "other").train)


def test_a_cache_directory_that_cannot_be_written(data_set: MakeData) -> None:
    a = data_set("a", TEXTS)
    with pytest.raises(ConfigError, match=r"data.cache_dir = '.*a.json/x': must be a directory that can be written"):
        build(a, cache_dir=f"{a}.json/x")


def test_missing_helpers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core.datasets.helpers_cpp", None)
    monkeypatch.delitem(sys.modules, "megatron.core.datasets.helpers")
    monkeypatch.delattr("megatron.core.datasets.helpers", raising=False)
    monkeypatch.delitem(sys.modules, "megatron_tied.data.datasets")
    with pytest.raises(ImportError, match="install it from its wheel"):
        importlib.import_module("megatron_tied.data.datasets")


RANK = """
import sys
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from megatron_tied.data.datasets import build_datasets
from megatron_tied.errors import ConfigError

rank, directory, a, b = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
store = dist.FileStore(str(directory / "store"), 2)
dist.init_process_group("gloo", rank=rank, world_size=2, store=store, timeout=timedelta(seconds=60))

def build(cache):
    return build_datasets(train=[0.75, a, 0.25, b], validation=None, split="9,1", cache_dir=directory / cache,
                          seq_length=32, train_samples=40, validation_samples=10, seed=1)

for attempt in range(2):
    datasets = build("cache")
    print([[data[i]["tokens"].tolist() for i in range(10)] for data in datasets])
    print(sorted(str(path) for path in (directory / "cache").rglob("*")))
if rank == 1:
    Path.is_dir = lambda path: False
try:
    build("unshared")
except ConfigError as error:
    print(error.problems[0].valid)
if rank == 0:
    (directory / "file").write_text("")
try:
    build("file/cache")
except ConfigError as error:
    print(error.problems[0].valid)
dist.destroy_process_group()
"""


def run_ranks(arguments: Sequence[str]) -> list[list[str]]:
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), *arguments], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    printed = [rank.communicate(timeout=120)[0].splitlines() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    return printed


def test_ranks_build_once_and_agree(data_set: MakeData, tmp_path: Path) -> None:
    a, b = data_set("a", TEXTS), data_set("b", TEXTS[::-1])
    alone = build([0.75, a, 0.25, b], split="9,1", train_samples=40)
    expected = str([tokens_of(alone.train, 10), tokens_of(alone.validation, 10)])
    directory = tmp_path / "ranks"
    directory.mkdir()
    for printed in run_ranks([str(directory), str(a), str(b)]):
        samples, cache, samples_again, cache_again, unshared, unwritable = printed
        assert samples == samples_again == expected
        assert cache == cache_again
        assert "building" not in cache
        assert "GPTDataset" in cache
        assert "BlendedDataset" in cache
        assert unshared == "must be in a file system that all ranks share"
        assert unwritable.startswith("must be a directory that can be written")
