"""One run under the deepspeed launcher that many tests look at."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from tests.training.runs import Corpus, Finished, deepspeed_command, finish, write_config


class Run(NamedTuple):
    """A run that has ended: its directory, its config file, and what it printed."""

    directory: Path
    config: Path
    finished: Finished


@pytest.fixture(scope="session")
def reference_run(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two processes, EP 2, ZeRO 1, two micro-batches a step, under the deepspeed launcher."""
    directory = tmp_path_factory.mktemp("reference")
    config = write_config(directory, corpus)
    finished = finish(deepspeed_command(config))
    assert finished.code == 0, finished.output[-6000:]
    return Run(directory / "run", config, finished)
