"""How a benchmark shows that it lives: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from tqdm import tqdm


class Done(NamedTuple):
    """How far a benchmark is: what it is at, and how many rounds are over, of how many."""

    what: str
    rounds: int
    of: int


Progress = Callable[[Done], object]


@contextmanager
def progress_bar(*, shown: bool) -> Iterator[Progress]:
    """On standard error, where that is a terminal and `shown`."""
    with tqdm(unit="round", dynamic_ncols=True, leave=False, disable=not (shown and sys.stderr.isatty())) as bar:

        def show(done: Done) -> None:
            bar.n, bar.total = done.rounds, done.of
            bar.set_description(done.what)

        yield show
