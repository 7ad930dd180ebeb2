"""The pictures that sinks keep of tables."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from megatron_tied.monitor.description import RunDescription
from megatron_tied.monitor.sinks import Metrics, Tables

_CHANCE = "agreement_overlap_chance/"
_LOADS = {"expert_load": ("load/layers", "layer"), "bank_load": ("load/banks", "bank")}


class TableImages:
    """Draws tables with what the run has told about itself so far."""

    def __init__(self, description: RunDescription):
        self._layers = {bank.index: bank.layers for bank in description.topology.banks}
        self._chance: dict[int, float] = {}

    def note(self, metrics: Metrics) -> None:
        """Remember what overlap is to be expected by chance."""
        named = ((name.removeprefix(_CHANCE), value) for name, value in metrics.items() if name.startswith(_CHANCE))
        self._chance |= {int(bank): value for bank, value in named}

    def draw(self, step: int, tables: Tables) -> Mapping[str, NDArray[np.uint8]]:
        """Images [height, width, 3] by tag, of tables that are there: load/layers, load/banks, agreement/groups."""
        # Here, because matplotlib takes a third of a second to load, and only the first rank draws.
        from megatron_tied.monitor.heat_maps import agreement_heat_maps, image, load_heat_map

        images = {
            tag: image(load_heat_map(tables[name], rows, step))
            for name, (tag, rows) in _LOADS.items()
            if tables.get(name)
        }
        if matrices := tables.get("agreement"):
            layers = {bank: self._layers[int(bank)] for bank in matrices}
            chance = {bank: self._chance[int(bank)] for bank in matrices if int(bank) in self._chance}
            images["agreement/groups"] = image(agreement_heat_maps(matrices, layers, chance, step))
        return images
