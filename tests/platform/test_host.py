"""What `prepare` does to this process, and the device and threads it gets."""

import os
import subprocess
import sys

import pytest
import torch

from megatron_tied import platform
from megatron_tied.platform.host import share_host_threads


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """On a CPU host with four cores: what torch was told about threads."""
    told: list[int] = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    return told


@pytest.mark.parametrize(("processes", "each"), [(1, 4), (2, 2), (3, 1), (8, 1)])
def test_processes_share_the_cores(threads, processes, each):
    share_host_threads(processes)
    assert threads == [each]


def test_the_users_own_thread_count_stands(threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    share_host_threads(2)
    assert threads == []


def test_a_cuda_host_keeps_its_threads(threads, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    share_host_threads(2)
    assert threads == []


@pytest.mark.parametrize(("has_cuda", "expected"), [(False, "cpu"), (True, "cuda:1")])
def test_device(monkeypatch, has_cuda, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert platform.device() == torch.device(expected)


# For a fresh process.
FRESH = """
import os, torch
compile_ = torch.compile
from megatron_tied.platform import prepare
prepare()
prepare()
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.moe import moe_utils
print(os.environ["DS_ACCELERATOR"], torch.compile is compile_, moe_utils.te_general_gemm)
print(torch.zeros(1, device=torch.cuda.current_device()).device)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the shims are for hosts without CUDA")
def test_prepare_on_a_cpu_host_is_quiet_and_leaves_torch_compile_alone():
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    command = [sys.executable, "-c", FRESH]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.stdout == "cpu True None\ncpu\n", finished.stderr[-2000:]
    assert "not installed" not in finished.stderr
