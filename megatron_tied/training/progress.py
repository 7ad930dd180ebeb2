"""How a run shows that it lives: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import Self

from tqdm import tqdm


def _whoever_reads() -> AbstractContextManager[None]:
    """A full disk under the log, or a terminal that is gone, ends no run."""
    return suppress(OSError)


class Progress:
    """Steps done, rate, time left and loss, on standard error of the first rank; other ranks stay quiet."""

    def __init__(self, steps: int, *, first: int = 0, enabled: bool = True):
        self._steps = steps
        self._enabled = enabled
        self._bar = tqdm(
            total=steps,
            initial=first,
            unit="step",
            desc="training",
            dynamic_ncols=True,
            disable=not (enabled and sys.stderr.isatty()),
        )

    def advance(self) -> None:
        """One step is done."""
        with _whoever_reads():
            self._bar.update()

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the figures of a logged step."""
        if not self._enabled:
            return
        if not self._bar.disable:
            with _whoever_reads():
                self._bar.set_postfix_str(f"loss {metrics['loss']:.4f}")
            return
        left = tqdm.format_interval((self._steps - step) * metrics["step_seconds"])
        self.say(
            f"step {step}/{self._steps}  loss {metrics['loss']:.4f}  grad norm {metrics['grad_norm']:.3f}  "
            f"lr {metrics['lr']:.2e}  {metrics['tokens_per_second']:,.0f} tokens/s  {left} left"
        )

    def say(self, line: str) -> None:
        """Print a line without breaking the bar."""
        if self._enabled:
            with _whoever_reads():
                tqdm.write(line, file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _whoever_reads():
            self._bar.close()
