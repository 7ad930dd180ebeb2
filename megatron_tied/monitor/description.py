"""What a run is, for people who compare runs: its settings, its banks, its size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from megatron_tied.topology import Bank, TieTopology

_COMPARED = (
    "model.preset",
    "model.num_layers",
    "model.hidden_size",
    "model.num_moe_experts",
    "model.moe_router_topk",
    "model.moe_aux_loss_coeff",
    "tie.group_size",
    "tie.pattern",
    "tie.num_tied_experts",
    "tie.lr_divisor",
    "tie.share",
    "parallel.expert_model_parallel_size",
    "parallel.tensor_model_parallel_size",
    "train.precision",
    "train.global_batch_size",
    "train.seq_length",
    "train.steps",
    "train.seed",
    "optimizer.lr",
    "optimizer.warmup_steps",
)


@dataclass(frozen=True)
class RunDescription:
    """A run as its config resolved it.

    config: the sections of config.yaml as plain JSON types; parameters: counts by name, such as `unique` and `untied`.
    """

    config: Mapping[str, Any]
    topology: TieTopology
    parameters: Mapping[str, int]
    world_size: int

    def hparams(self) -> dict[str, bool | str | float | int]:
        """The settings that runs differ in, by dotted name: the same names for every run, so that they compare."""
        values = {name: _of_table(self._setting(name)) for name in _COMPARED}
        if self.topology.tie.banks is not None:
            values |= {"tie.group_size": max(bank.size for bank in self.topology.banks), "tie.pattern": "banks"}
        if self.topology.tie.num_tied_experts is None:
            values["tie.num_tied_experts"] = values["model.num_moe_experts"]
        values["deepspeed.zero_stage"] = _of_table(self._setting("deepspeed.zero_optimization.stage", 1))
        values["world_size"] = self.world_size
        return values | {f"parameters.{name}": self.parameters.get(name, 0) for name in ("unique", "untied")}

    def config_markdown(self) -> str:
        """The whole config as YAML."""
        return f"```yaml\n{yaml.safe_dump(dict(self.config), sort_keys=False)}```\n"

    def topology_markdown(self) -> str:
        """Which layers use which bank, in one line and as a table."""
        rows = ((bank.index, *self._columns(bank)) for bank in self.topology.banks)
        table = _table(("bank", "layers", "tied", "experts", "learning rate divided by"), rows)
        return f"{self.topology.describe()}\n\n{table}"

    def parameters_markdown(self) -> str:
        """Parameters and bytes, and what tying saves of them."""
        rows = [(name.replace("_", " "), f"{count:,}") for name, count in self.parameters.items()]
        rows.append(("processes", f"{self.world_size:,}"))
        unique, untied = self.parameters.get("unique"), self.parameters.get("untied")
        saved = f"Tying saves {1 - unique / untied:.1%} of the parameters.\n\n" if unique and untied else ""
        return saved + _table(("", "count"), rows)

    def _setting(self, name: str, default: Any = None) -> Any:
        value: Any = self.config
        for key in name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return default if value is None else value

    def _columns(self, bank: Bank) -> Sequence[str]:
        experts = self.topology.num_experts(bank, self._setting("model.num_moe_experts"))
        layers = " ".join(map(str, bank.layers))
        return layers, "yes" if bank.is_tied else "no", f"{experts}", f"{self.topology.lr_divisor(bank):.4g}"


def _of_table(value: Any) -> bool | str | float | int:
    return value if isinstance(value, (bool, str, float, int)) else "none" if value is None else str(value)


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
