"""Optimizer states that are made before a checkpoint fills them."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_tied.engine import partitions


def test_numbers_are_where_fused_kernels_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    holder = torch.empty(3, device="meta")  # as a GPU's, another device than the CPU's
    states: dict[torch.Tensor, dict[str, Any]] = defaultdict(dict)
    held = SimpleNamespace(inner=SimpleNamespace(state=states), by_group=lambda: [({}, [holder])])
    monkeypatch.setattr(partitions, "holdings", lambda engine: held)
    partitions.create_optimizer_states(SimpleNamespace(), ["exp_avg"], {"step": 3.0})
    assert {key: (value.device.type, value.shape) for key, value in states[holder].items()} == {
        "exp_avg": ("meta", holder.shape),
        "step": ("meta", torch.Size([])),
    }
