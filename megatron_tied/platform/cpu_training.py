"""Shims that let Megatron's optimizers and `megatron.training` run on a host without CUDA.

Installed by `prepare_training()`, never elsewhere. Both ask for CUDA by name where they make tensors, streams and
memory statistics. Slow is fine here: this is for trying a script out, and for tests.
"""

from __future__ import annotations

import contextlib
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _OnHost(TorchFunctionMode):
    """Makes on the CPU whatever asks for CUDA."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Clipping asserts the gradient's type by this name.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        kwargs = {name: _host(value) if name == "device" else value for name, value in (kwargs or {}).items()}
        if func is torch.Tensor.to:
            args = tuple(map(_host, args))
        return func(*args, **kwargs)


def _host(value: Any) -> Any:
    name = value.type if isinstance(value, torch.device) else value
    return torch.device("cpu") if isinstance(name, str) and name.split(":")[0] == "cuda" else value


class _Stream:
    """A stream in whose order everything happens anyway."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def wait_stream(self, other: object) -> None:
        """Nothing is ever behind."""


def install_shims() -> None:
    """Install every shim of this module, once."""
    # Never left: a script's whole run is inside.
    _OnHost().__enter__()  # type: ignore[no-untyped-call]  # torch's has no types
    _pretend_one_device(torch.cuda)
    _load_into_new_optimizers()
    # In the wheel only from 0.17 on; before, in a script's own tree.
    if find_spec("megatron.training") is not None:
        _import_without_triton()
        _initialize_without_cuda()
        _compile_once()


def _pretend_one_device(cuda: Any) -> None:
    cuda.device_count = lambda: 1
    # Both would count the device just made up.
    cuda.is_available = lambda: False
    torch.accelerator.is_available = lambda: False
    # A function each: torch's compiler keeps a table of them, in which none may stand twice.
    for name in ("set_device", "synchronize", "empty_cache", "set_rng_state"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    cuda.Stream = _Stream
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, lambda *args, **kwargs: _Stream())
    for name in ("memory_allocated", "memory_reserved", "device_memory_used"):
        setattr(cuda, name, lambda *args, **kwargs: 0)
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    for name in ("FloatTensor", "HalfTensor", "BFloat16Tensor"):
        setattr(cuda, name, getattr(torch, name))


def _load_into_new_optimizers() -> None:
    """Without Transformer Engine and apex, the distributed optimizer loads into torch's AdamW: it asks one that is new
    for the step it has made, and each parameter's saved state for a step that is saved once."""
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    optimizer_class = distrib_optimizer.DistributedOptimizer
    original_state, original_set = (
        optimizer_class.sharded_state_dict,
        optimizer_class._set_main_param_and_optimizer_states,
    )

    def sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        inner = self.optimizer
        for weight in (weight for group in inner.param_groups for weight in group["params"]):
            if not inner.state[weight]:
                empty = {name: torch.zeros_like(weight.data) for name in ("exp_avg", "exp_avg_sq")}
                inner.state[weight] = {"step": torch.zeros(()), **empty}
        return original_state(self, *args, **kwargs)

    @torch.no_grad()
    def set_states(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        own = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        # One tensor is given to all parameters, each of which would count up in it.
        own["step"] = own["step"].clone()
        original_set(self, model_param, {**tensors, "step": own["step"]})

    optimizer_class.sharded_state_dict = sharded_state_dict
    optimizer_class._set_main_param_and_optimizer_states = set_states


def _compile_once() -> None:
    """Every run compiles the dataset helpers again, for which a host without CUDA often lacks the headers."""
    from megatron.core.datasets import utils

    if find_spec("megatron.core.datasets.helpers_cpp") is not None:
        utils.compile_helpers = lambda: None


def _import_without_triton() -> None:
    """`megatron.training` imports kernels that only `--batch-invariant-mode` calls; triton comes with CUDA's torch."""
    if find_spec("triton") is None:
        kernels = ModuleType("megatron.core.transformer.custom_layers.batch_invariant_kernels")
        vars(kernels)["enable_batch_invariant_mode"] = None
        sys.modules[kernels.__name__] = kernels


def _initialize_without_cuda() -> None:
    from megatron.training import initialize, training

    # CUDA kernels of an older model class, gone from later versions.
    if hasattr(initialize, "fused_kernels"):
        initialize.fused_kernels.load = lambda args: None

    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        return initialize.initialize_megatron(*args, **kwargs, allow_no_cuda=True)

    training.initialize_megatron = initialize_megatron
