"""How a benchmark shows that it lives: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import Self

from tqdm import tqdm


class Bar:
    """Rounds done, on standard error of the first rank."""

    def __init__(self) -> None:
        shown = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
        self._bar = tqdm(unit="round", dynamic_ncols=True, leave=False, disable=not shown)

    def show(self, what: str, done: int, total: int) -> None:
        """Say what is being done, how much of it is, and of how much."""
        self._bar.total = total
        self._bar.n = done
        self._bar.set_description(what)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
