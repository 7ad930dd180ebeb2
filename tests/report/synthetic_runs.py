"""Run directories as training writes them, with made-up numbers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_tied.topology import TieConfig, TieTopology
from megatron_tied.training.config_file import load_config, parse_config, save_config

LAYERS, EXPERTS, TOP_K = 8, 16, 4
TIED = TieConfig(group_size=2, skip_first=1, skip_last=1)  # 0 [1 2] [3 4] [5 6] 7
UNTIED = TieConfig()


def topology_of(path: Path) -> TieTopology:
    """What the command reads topologies with."""
    return load_config(path).topology()


def write_lines(directory: Path, lines: Iterable[Mapping[str, Any]], end: str = "") -> Path:
    """A run directory with nothing but metrics.jsonl; `end` is what a live run has half written."""
    directory.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(text + end, encoding="utf-8")
    return directory


def write_config(directory: Path, tie: TieConfig = UNTIED, **train: Any) -> None:
    """The resolved config of a run of eight layers."""
    model = {"preset": "quickstart", "vocab_size": 4096}
    sections = {"model": model, "data": {"train": "data/corpus"}, "train": {"run_dir": str(directory), **train}}
    directory.mkdir(parents=True, exist_ok=True)
    save_config(parse_config(sections).model_copy(update={"tie": tie}), directory / "config.yaml")


@dataclass(frozen=True)
class Synthetic:
    """A run of `steps` steps. without: metrics that were not logged, by the part before the slash."""

    tie: TieConfig
    steps: int = 600
    seed: int = 0
    log_every: int = 5
    observe_every: int = 20
    without: Collection[str] = ()

    def write(self, directory: Path, finished: bool = True) -> Path:
        """Write it; one that has not finished was last written to a day ago."""
        write_config(directory, self.tie, steps=self.steps)
        done = self.steps if finished else self.steps // 2
        kept = (self._kept(line) for line in self._lines() if line["step"] <= done)
        write_lines(directory, kept)
        if finished:
            summary = {"steps": self.steps, "topology": self._topology.describe()}
            (directory / "summary.json").write_text(json.dumps(summary))
        else:
            os.utime(directory / "metrics.jsonl", (1e9, 1e9))
        return directory

    @property
    def _topology(self) -> TieTopology:
        return TieTopology.build(self.tie, LAYERS)

    def _kept(self, line: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in line.items() if name.partition("/")[0] not in self.without}

    def _lines(self) -> Iterator[dict[str, Any]]:
        noise = np.random.default_rng(self.seed)
        for step in range(self.log_every, self.steps + 1, self.log_every):
            yield {"step": step, **self._logged(step, noise)}
            if step % self.observe_every == 0:
                yield {"step": step, **self._observed(step, noise)}
            if step % (5 * self.observe_every) == 0:
                yield {"step": step, "validation_loss": self._loss(step) + 0.08 + 0.01 * noise.standard_normal()}
                yield {"step": step, **self._of_banks(noise)}
                yield {"step": step, **self._tables(noise)}

    def _loss(self, step: int) -> float:
        tied = len(self._topology.banks) < LAYERS
        return 2.0 + 0.05 * tied + 6.0 * math.exp(-step / 90) + 1.2 * math.exp(-step / 400)

    def _logged(self, step: int, noise: np.random.Generator) -> dict[str, float]:
        banks, loss = len(self._topology.banks), self._loss(step) + 0.06 * noise.standard_normal()
        parts = {"data": 0.01, "forward": 0.12, "backward": 0.22, "reduce": 0.05, "optimizer": 0.01 * banks}
        times = {f"time/{part}": seconds * noise.uniform(0.9, 1.1) for part, seconds in parts.items()}
        seconds = sum(times.values()) + 0.02 + (2.0 if step == self.log_every else 0.0)
        return {
            "loss": loss + 0.1,
            "lm_loss": loss,
            "grad_norm": 0.6 + 4 * math.exp(-step / 60) + 0.1 * noise.random(),
            "tokens_per_second": 8192 / seconds,
            "step_seconds": seconds,
            "memory_gb": 2.0 + 0.4 * banks,
            "memory_fullest_gb": 2.1 + 0.4 * banks,
            "states_gb": 0.5 + 0.3 * banks,
            "planned_memory_gb": 2.3 + 0.42 * banks,
            "planned_states_gb": 0.5 + 0.3 * banks,
            "parameters_unique": 2e6 + banks * 1e6,
            "parameters_untied": 10e6,
            **times,
            "time/other": 0.02,
        }

    def _observed(self, step: int, noise: np.random.Generator) -> dict[str, float]:
        late = math.exp(-step / 200)
        layers = {f"{layer:02d}": 0.3 + 0.1 * layer + late + 0.1 * noise.random() for layer in range(LAYERS)}
        banks, tied = self._topology.banks, [bank for bank in self._topology.banks if bank.is_tied]
        return {
            "routing/max_vio": float(np.mean(list(layers.values()))),
            "routing/max_vio_worst": max(layers.values()),
            "routing/token_entropy": 0.6 + 0.3 * late + 0.01 * noise.random(),
            "routing/mean_entropy": 0.98 - 0.1 * late + 0.003 * noise.random(),
            "routing/dead_fraction": 0.05 * (1 - late),
            "routing/dropped": 0.02 * late,
            **{f"layer_max_vio/{layer}": value for layer, value in layers.items()},
            **{f"bank_dead_fraction/{bank.index:02d}": bank.index / EXPERTS / 2 for bank in banks},
            **{
                f"agreement_{kind}{end}/{bank.index:02d}": value
                for bank in tied
                for kind, chance in (("top1", 1 / EXPERTS), ("overlap", TOP_K / EXPERTS), ("distinct", 0.23))
                for end, value in (
                    ("", chance + 0.1 * bank.index * (1 - late) + 0.01 * noise.random()),
                    ("_chance", chance),
                )
            },
        }

    def _of_banks(self, noise: np.random.Generator) -> dict[str, float]:
        figures: dict[str, float] = {}
        for bank in self._topology.banks:
            of_bank = {"weight_norm": 30 + bank.index, "update_ratio": 1e-3 / (1 + bank.index)}
            if bank.is_tied:
                cosine = 0.4 - 0.1 * bank.index + 0.05 * noise.random()
                of_bank |= {"gradient_cosine": cosine, "gradient_cosine_min": cosine - 0.1}
                of_bank["gradient_cancellation"] = 0.3 - 0.05 * bank.index
            figures |= {f"bank_{name}/{bank.index:02d}": value for name, value in of_bank.items()}
        return figures

    def _tables(self, noise: np.random.Generator) -> dict[str, Any]:
        def load() -> list[float]:
            shares = noise.gamma(4.0, size=EXPERTS)
            return [round(share, 5) for share in (shares / shares.mean()).tolist()]

        def matrix(size: int) -> list[list[float]]:
            overlap = 0.25 + 0.3 * noise.random((size, size))
            overlap = (overlap + overlap.T) / 2
            np.fill_diagonal(overlap, 1.0)
            return overlap.round(5).tolist()

        banks = self._topology.banks
        return {
            "expert_load": {str(layer): load() for layer in range(LAYERS)},
            "bank_load": {str(bank.index): load() for bank in banks},
            "agreement": {str(bank.index): matrix(bank.size) for bank in banks if bank.is_tied},
        }
