"""How a benchmark shows that it lives: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """On standard error of the first rank; gives a function of what is being done, and of rounds done and in all."""
    shown = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
    with tqdm(unit="round", dynamic_ncols=True, leave=False, disable=not shown) as bar:

        def show(what: str, done: int, total: int) -> None:
            bar.n, bar.total = done, total
            bar.set_description(what)

        yield show
