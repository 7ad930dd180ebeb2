"""Process groups: Megatron-Core makes them, DeepSpeed is told about them."""

from __future__ import annotations

import os
from types import ModuleType

import deepspeed
import torch
from deepspeed.utils import groups as deepspeed_groups
from megatron.core import parallel_state

from megatron_tied.engine import mpu
from megatron_tied.errors import ConfigError, Problem
from megatron_tied.layers.moe_layer import tied_layers
from megatron_tied.platform.cpu import skip_inference_kernel
from megatron_tied.platform.rendezvous import listen_on_master_address, stay_on_this_host


def start_distributed() -> None:
    """Start torch.distributed, and DeepSpeed's communication on top of it, each unless somebody has.

    From here on this rank's GPU is the one that the launcher has for it.
    """
    skip_inference_kernel()
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        # Models are built, and generators seeded, before DeepSpeed's engine would see to it.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store = None
    if not torch.distributed.is_initialized():
        stay_on_this_host()
        store = listen_on_master_address()
    deepspeed.init_distributed(verbose=False)
    del store  # torch.distributed holds it from here on


def initialize_model_parallel(expert_model_parallel_size: int = 1, tensor_model_parallel_size: int = 1) -> None:
    """Start communication (if nobody has) and make Megatron-Core's process groups.

    Expert parallel groups are runs of `expert_model_parallel_size` neighbouring ranks, tensor parallel groups runs of
    `tensor_model_parallel_size`, so that they lie inside a node wherever the node's size allows. Experts are whole on
    every tensor parallel rank. Raises `ConfigError` if a size does not divide the world.
    """
    start_distributed()
    world = torch.distributed.get_world_size()
    sizes = {
        "expert_model_parallel_size": expert_model_parallel_size,
        "tensor_model_parallel_size": tensor_model_parallel_size,
    }
    wrong = {name: size for name, size in sizes.items() if world % size}
    if wrong:
        valid = f"must divide the world size {world}"
        raise ConfigError([Problem(f"parallel.{name}", size, valid) for name, size in wrong.items()])
    # The extra gloo groups serve Megatron's own distributed optimizer; every group keeps threads of its own.
    parallel_state.initialize_model_parallel(**sizes, expert_tensor_parallel_size=1, create_gloo_process_groups=False)


def expert_group_name() -> str:
    """The key under which DeepSpeed knows the expert parallel groups; it reads the size out of the name."""
    return f"ep_size_{parallel_state.get_expert_model_parallel_world_size()}"


def model_parallel_unit() -> ModuleType | None:
    """What DeepSpeed asks for its groups with tensor parallelism; None without, when it makes data parallel ones."""
    return mpu if parallel_state.get_tensor_model_parallel_world_size() > 1 else None


def register_with_deepspeed() -> None:
    """Enter Megatron-Core's groups in DeepSpeed's registry.

    DeepSpeed enters there what its own MoE layers create; without the entry it would average the gradients of
    different experts, in some ZeRO stages without any error.
    """
    deepspeed_groups.mpu = model_parallel_unit()
    name = expert_group_name()
    expert_parallel = parallel_state.get_expert_model_parallel_group()
    expert_data_parallel = parallel_state.get_expert_data_parallel_group()
    deepspeed_groups._EXPERT_PARALLEL_GROUP[name] = expert_parallel
    deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS[name] = torch.distributed.get_process_group_ranks(expert_parallel)
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP[name] = expert_data_parallel
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = torch.distributed.get_process_group_ranks(
        expert_data_parallel
    )


def is_expert_parallel(parameter: torch.nn.Parameter) -> bool:
    """True for a parameter whose gradient is reduced over expert-DP instead of DP (Megatron's mark)."""
    return not getattr(parameter, "allreduce", True)


def mark_expert_parameters(model: torch.nn.Module) -> None:
    """Give expert parameters the marks by which DeepSpeed places their gradients and ZeRO partitions.

    Megatron's own mark is renewed: it is lost where a conversion makes new Parameters. The ZeRO 3 marks are those
    DeepSpeed made for its own AutoEP layers (`_resolve_zero3_param_placement`).
    """
    for layer in tied_layers(model):
        for weight in layer.experts.parameters():
            weight.allreduce = layer.config.expert_model_parallel_size == layer.config.tensor_model_parallel_size == 1
    name = expert_group_name()
    for parameter in model.parameters():
        if is_expert_parallel(parameter):
            vars(parameter).update(
                group_name=name,
                # For the gradient norm, in which DeepSpeed leaves out whatever tensor parallel ranks hold in common.
                model_parallel=True,
                ds_zero_placement_family="autoep_expert",
                ds_zero_partition_group_name=name,
            )
