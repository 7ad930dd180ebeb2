"""When each expert of each layer was last given a token; an expert not used for long is dead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch


class LastUse:
    """The last observed step at which each expert had a token: by layer, [experts] int64, 0 before the first.

    It is saved with a checkpoint, so that a run that goes on counts on.
    """

    def __init__(self) -> None:
        self._steps: dict[int, torch.Tensor] = {}

    def note(self, step: int, layer: int, counts: torch.Tensor) -> None:
        """`counts` [experts]: the assignments of `layer` in the global batch of `step`."""
        before = self._steps.get(layer)
        if before is None or before.shape != counts.shape:
            before = torch.zeros_like(counts, dtype=torch.int64)
        self._steps[layer] = torch.where(counts > 0, step, before)

    def dead_fraction(self, step: int, window: int, layers: Iterable[int]) -> float:
        """Of the experts of a bank that `layers` use, those without a token from any of them for `window` steps."""
        last = torch.stack([self._steps[layer] for layer in layers]).amax(0)
        return (step - last >= window).double().mean().item()

    def to_dict(self) -> dict[str, list[int]]:
        """JSON types only."""
        return {str(layer): steps.tolist() for layer, steps in self._steps.items()}

    def restore(self, saved: Mapping[str, Sequence[int]]) -> None:
        """Go on from what `to_dict` returned."""
        self._steps = {int(layer): torch.tensor(steps) for layer, steps in saved.items()}
