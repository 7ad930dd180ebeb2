"""Shims that let Megatron-Core 0.16 to 0.19 run on a host without CUDA. Installed by `prepare()`, never elsewhere.

Megatron-Core assumes a CUDA device in the places below; each shim says which. Upstream begins to lift these
assumptions; a shim whose reason is gone should go too.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch


def _shim_torch_cuda() -> None:
    # Router, dispatcher, experts, collectives and rotary embedding allocate on `torch.cuda.current_device()`.
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]  # as upstream takes it


def _import_without_compiling() -> None:
    """Megatron-Core wraps small functions in `torch.compile` as it is imported; on a CPU host that would run a
    C++ compiler for minutes in every rank, to fuse a few element-wise operations."""
    with patch.object(torch, "compile", _as_it_is):
        import megatron.core.jit

        megatron.core.jit.disable_jit_fuser()


def _as_it_is(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """`torch.compile`, as a function or a decorator, without compiling."""
    return _as_it_is if function is None else function


def _shim_rng() -> None:
    """The RNG tracker swaps CUDA generator states; here it swaps the host generator's."""
    from megatron.core.tensor_parallel import random

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(new_state)

    class HostRNGStatesTracker(random.CudaRNGStatesTracker):
        """Megatron's named RNG streams, kept on the host generator."""

        def add(self, name: str, seed: int) -> None:
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"RNG stream {name!r} or seed {seed} already exists")
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            # Upstream's version warns when the host state changes inside, which here is the whole point.
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state
    random.CudaRNGStatesTracker = HostRNGStatesTracker


def _shim_dispatcher() -> None:
    """Gloo's all-to-all takes lists where the dispatcher, without a device to copy from, leaves tensors; and its
    constructor makes a CUDA stream for those copies unless the class has one."""
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    def host_splits(
        self: MoEAlltoAllTokenDispatcher, point: str, tokens_per_expert: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        if point == self.cuda_dtoh_point:
            for name in ("input_splits", "output_splits"):
                splits = getattr(self, name)
                if torch.is_tensor(splits):
                    setattr(self, name, splits.tolist())
        return tokens_per_expert

    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = host_splits
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = "none on a CPU host"


def _shim_softmax() -> None:
    """Upstream's core attention makes the mask it is not given on a CUDA device."""
    from megatron.core.fusions import fused_softmax

    def causal_mask(length: int) -> torch.Tensor:
        return torch.ones(length, length, dtype=torch.bool).triu(diagonal=1)

    fused_softmax.get_default_causal_mask = causal_mask


def skip_inference_kernel() -> None:
    """Keep DeepSpeed from compiling, in each new environment of a CPU host, an all-reduce that only inference uses.

    It takes a C++ compiler half a minute. To be called before `deepspeed.init_distributed`.
    """
    # Not `from deepspeed.comm import torch`: that name is PyTorch's.
    backend: Any = import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None


def _silence_cuda_advice() -> None:
    """Megatron-Core recommends CUDA_DEVICE_MAX_CONNECTIONS=1 to whoever uses sequence parallelism."""
    warnings.filterwarnings("ignore", message="When using sequence parallelism it is recommended")


def install_shims() -> None:
    """Install every shim of this module, once."""
    _shim_torch_cuda()
    _import_without_compiling()
    _shim_rng()
    _shim_dispatcher()
    _shim_softmax()
    _silence_cuda_advice()
