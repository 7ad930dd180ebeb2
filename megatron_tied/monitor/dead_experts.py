"""When each expert of each layer was last given a token; an expert not used for long is dead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypedDict

import torch


class SavedUse(TypedDict):
    """A `LastUse` in JSON types: the last observed step, and by layer the last step of each expert."""

    observed: int
    steps: dict[str, list[int]]


class LastUse:
    """The last observed step at which each expert had a token: by layer, [experts] int64.

    Before the first observation, every expert counts as used. It is saved with a checkpoint, so that a run that goes on
    counts on; after a stretch without observations, more than `every` steps apart, the count begins anew.
    """

    def __init__(self, every: int):
        self._every = every
        self._observed = 0
        self._steps: dict[int, torch.Tensor] = {}

    def note(self, step: int, counts: Mapping[int, torch.Tensor]) -> None:
        """counts: by layer, the assignments of each expert in the global batch of `step`, [experts]."""
        if step - self._observed > self._every:
            self._steps = {}
        for layer, of_layer in counts.items():
            before = self._steps.get(layer)
            if before is None or before.shape != of_layer.shape:
                before = torch.full_like(of_layer, step - 1, dtype=torch.int64)
            self._steps[layer] = torch.where(of_layer > 0, step, before)
        self._observed = step

    def dead_fraction(self, step: int, window: int, layers: Iterable[int]) -> float:
        """Of the experts of a bank that `layers` use, those that none of them has given a token for `window` steps."""
        last = torch.stack([self._steps[layer] for layer in layers]).amax(0)
        return (step - last >= window).double().mean().item()

    def to_dict(self) -> SavedUse:
        """What `restore` takes."""
        return {"observed": self._observed, "steps": {str(layer): of.tolist() for layer, of in self._steps.items()}}

    def restore(self, saved: SavedUse) -> None:
        """Go on from what `to_dict` returned."""
        self._observed = saved["observed"]
        self._steps = {int(layer): torch.tensor(steps) for layer, steps in saved["steps"].items()}
