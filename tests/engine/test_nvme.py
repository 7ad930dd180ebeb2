"""Offload to NVMe, where DeepSpeed's aio kernel builds (libaio's headers and a C++ compiler)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder

from tests.distributed.training_run import full_weights, routing_engine, step
from tests.tiny_model import FIELDS, build

pytestmark = [
    pytest.mark.usefixtures("launched"),
    pytest.mark.slow,  # the kernel takes minutes to compile
    pytest.mark.skipif(not AsyncIOBuilder().is_compatible(verbose=False), reason="DeepSpeed's aio cannot be built"),
]


def trained(zero: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights after three steps at stage 3."""
    engine = routing_engine(build(), {"zero_optimization": {"stage": 3, **zero}})
    for seed in range(3):
        rows = torch.randint(FIELDS["vocab_size"], (4, 9), generator=torch.Generator().manual_seed(seed))
        step(engine, rows, 2)
    weights = full_weights(engine.module)
    engine.destroy()
    return weights


def test_nvme_changes_nothing(tmp_path: Path) -> None:
    disk = {"device": "nvme", "nvme_path": str(tmp_path)}
    expected = trained({})
    for offloaded in (
        {"offload_optimizer": disk},
        {"offload_optimizer": disk, "offload_param": {**disk, "buffer_count": 50, "buffer_size": 100_000}},
    ):
        torch.testing.assert_close(trained(offloaded), expected, rtol=1e-6, atol=1e-7)
