"""What machines can do: `hardware.yaml`, or a file of the user's in its form."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.planner.activations import FUSED, UNFUSED, Kernels
from megatron_tied.planner.layout import Precision
from megatron_tied.planner.memory import Reserve

GB = 1_000_000_000

_OURS = Path(__file__).with_name("hardware.yaml")

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Efficiency = Annotated[float, Field(gt=0, le=1)]


class Hardware(BaseModel):
    """One kind of device and the networks around it; units and meaning of the fields: see hardware.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    memory_gb: Positive
    tflops: dict[Precision, Positive]
    memory_gbs: Positive
    node_gbs: Positive
    network_gbs: Positive
    host_gbs: Positive
    host_adam_gelements: Positive
    ranks_per_node: Annotated[int, Field(ge=1)]
    matmul_efficiency: Efficiency
    network_efficiency: Efficiency
    overlap: Share
    reserve_gb: Annotated[float, Field(ge=0)]
    fragmentation: Share
    fused_kernels: bool

    @property
    def memory(self) -> int:
        """Bytes of device memory."""
        return int(self.memory_gb * GB)

    @property
    def reserve(self) -> Reserve:
        """What tensors cannot have of it."""
        return Reserve(int(self.reserve_gb * GB), self.fragmentation)

    @property
    def kernels(self) -> Kernels:
        """Which kernels run on it."""
        return FUSED if self.fused_kernels else UNFUSED


def load_hardware(choice: str) -> Hardware:
    """The hardware named `choice`: NAME of hardware.yaml, or FILE:NAME. Raises ConfigError."""
    file, _, name = choice.rpartition(":")
    path = Path(file) if file else _OURS
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(Problem("--hardware", choice, f"must be NAME or FILE:NAME of a YAML file: {error}")) from None
    key = name if isinstance(entries, dict) and name in entries else name.lower()
    if not isinstance(entries, dict) or not isinstance(entries.get(key, {}), dict):
        valid = f"must be an entry of a YAML file, such as {_OURS.name} has; {path} has none"
        raise ConfigError(Problem("--hardware", choice, valid))
    if key not in entries:
        known = list(entries)
        close = get_close_matches(name.lower(), map(str, known), n=1)
        hint = f"; did you mean {close[0]}?" if close else "; or FILE:NAME"
        raise ConfigError(Problem("--hardware", choice, f"must be one of {', '.join(map(str, known))}{hint}"))
    try:
        return Hardware(name=key, **entries[key])
    except ValidationError as error:
        raise ConfigError(_problem(f"{path}: {name}", item) for item in error.errors(include_url=False)) from None


def _problem(entry: str, item: ErrorDetails) -> Problem:
    field = f"{entry}.{'.'.join(map(str, item['loc']))}"
    if item["type"] == "missing":
        return Problem(field, None, "must be given")
    return Problem(field, item["input"], item["msg"].replace("Input should be", "must be"))
