from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megatron_tied.data.prepare import prepare_data
from megatron_tied.data.tokenizer import SentencePieceTokenizer, train_tokenizer
from tests.data.corpus import make_text, write_jsonl


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    path.write_bytes(train_tokenizer([make_text(5000)], 320).model)
    return path


@pytest.fixture(scope="session")
def tokenizer(model: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer.load(model)


@pytest.fixture
def data_set(tmp_path: Path, model: Path) -> Callable[..., Path]:
    """Makes the data set `name` of the given documents; returns its prefix."""

    def make(name: str, texts: Sequence[str], tokenizer: Path = model) -> Path:
        source = write_jsonl(tmp_path / f"{name}.jsonl", texts)
        prefix = tmp_path / name
        prepare_data([source], prefix, tokenizer=tokenizer, workers=1)
        return prefix

    return make
