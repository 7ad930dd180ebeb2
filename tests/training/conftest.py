"""A corpus made by the `prepare-data` command, and one run under the deepspeed launcher that many tests look at."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.data.corpus import make_text, write_jsonl
from tests.training.runs import Corpus, Finished, deepspeed_command, finish, write_config


class Run(NamedTuple):
    """A run that has ended: its directory, its config file, and what it printed."""

    directory: Path
    config: Path
    finished: Finished


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    directory = tmp_path_factory.mktemp("corpus")
    made = Corpus(directory / "a", directory / "b", directory / "a.model")
    for prefix, seed, options in (
        (made.a, 0, ("--train-tokenizer", "--vocab-size", "320")),
        (made.b, 100, ("--tokenizer", str(made.tokenizer))),
    ):
        texts = [make_text(300, seed + number) for number in range(40)]
        source = write_jsonl(prefix.with_suffix(".jsonl"), texts)
        command = [sys.executable, "-m", "megatron_tied.cli.main", "prepare-data", "--workers", "1"]
        done = finish([*command, "--input", str(source), "--output", str(prefix), *options])
        assert done.code == 0, done.output
    return made


@pytest.fixture(scope="session")
def reference_run(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two processes, EP 2, ZeRO 1, two micro-batches a step, under the deepspeed launcher."""
    directory = tmp_path_factory.mktemp("reference")
    config = write_config(directory, corpus)
    finished = finish(deepspeed_command(config))
    assert finished.code == 0, finished.output[-6000:]
    return Run(directory / "run", config, finished)
