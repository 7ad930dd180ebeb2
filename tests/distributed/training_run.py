"""Trains the project's model from given weights and records what the oracle records. Imported by workers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import safe_get_full_grad
from megatron.core import parallel_state
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import megatron_tied as mt
from megatron_tied.monitor.moe_losses import take_moe_losses
from tests.oracle.names import (
    all_experts_name,
    join_tensor_parallel,
    tensor_parallel_dim,
    tensor_parallel_part,
    to_megatron,
    to_reference,
)
from tests.oracle.reference import LATENT_ATTENTION, ROUTED_SCALING, YARN, ReferenceSpec, Weights
from tests.process_groups import leave_groups
from tests.tiny_model import FIELDS

# A small eps would let AdamW amplify the rounding of near-zero gradients beyond the tolerances.
HYPERPARAMETERS: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-5}


# Megatron-Core's options for each way to recompute; all but `non_reentrant` are its own, and reentrant.
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "non_reentrant": {},
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "moe_act": {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]},
    "layernorm": {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
    "core_attn": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "mla_up_proj": {"recompute_granularity": "selective", "recompute_modules": ["mla_up_proj"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "full_by_5": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 5},
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3},
}


@dataclass(frozen=True)
class Case:
    """One cell of the matrix: parallelism, ZeRO stage, accumulation, and how the experts are built and reached."""

    ep: int = 1
    tp: int = 1
    stage: int = 1
    accumulation: int = 1
    backend: str = "grouped"
    dispatcher: str = "alltoall"
    lr_divisor: str = "sqrt"
    recompute: str = "none"
    overlap: bool = False


def model_config(spec: ReferenceSpec, case: Case) -> mt.ModelConfig:
    """The project's config of the reference's architecture."""
    latent = _latent_attention(spec) if spec.arch == "deepseek_v2" else {}
    return mt.ModelConfig.resolve(
        {
            "num_layers": spec.num_layers,
            "hidden_size": spec.hidden_size,
            "num_attention_heads": spec.num_heads,
            "num_query_groups": spec.num_kv_heads,
            "kv_channels": spec.head_dim,
            "num_moe_experts": spec.num_experts,
            "moe_router_topk": spec.top_k,
            "moe_ffn_hidden_size": spec.expert_ffn,
            "vocab_size": spec.vocab_size,
            "layernorm_epsilon": spec.norm_eps,
            "rotary_base": int(spec.rope_base),
            "qk_layernorm": True,
            "qk_norm_scope": "projection" if spec.arch == "olmoe" else "head",
            "qkv_clip": spec.qkv_clip,
            "moe_router_pre_softmax": spec.arch != "qwen3_moe",
            "moe_aux_loss_coeff": spec.aux_coeff,
            "moe_z_loss_coeff": spec.z_coeff,
            "moe_token_dispatcher_type": case.dispatcher,
            "expert_backend": case.backend,
            **latent,
            **RECOMPUTE[case.recompute],
        }
    )


def _latent_attention(spec: ReferenceSpec) -> dict[str, Any]:
    return {
        "multi_latent_attention": True,
        "q_lora_rank": LATENT_ATTENTION["q_lora_rank"],
        "kv_lora_rank": LATENT_ATTENTION["kv_lora_rank"],
        "qk_head_dim": LATENT_ATTENTION["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": LATENT_ATTENTION["qk_rope_head_dim"],
        "v_head_dim": LATENT_ATTENTION["v_head_dim"],
        "rope_type": "yarn",
        "rotary_scaling_factor": YARN["factor"],
        **{name: value for name, value in YARN.items() if name != "factor"},
        "moe_shared_expert_intermediate_size": spec.expert_ffn,
        "moe_router_topk_scaling_factor": ROUTED_SCALING,
    }


@contextmanager
def model_parallel(ep: int, tp: int = 1) -> Iterator[None]:
    """Process groups for one case. Those of the case before serve again if they fit: each set keeps many threads."""
    if not parallel_state.model_parallel_is_initialized() or _sizes() != (ep, tp):
        leave_groups()
        mt.initialize_model_parallel(ep, tp)
    yield


def _sizes() -> tuple[int, int]:
    expert = parallel_state.get_expert_model_parallel_world_size()
    return expert, parallel_state.get_tensor_model_parallel_world_size()


def local_experts(model: torch.nn.Module) -> slice:
    """The global experts that this rank holds."""
    group = parallel_state.get_expert_model_parallel_group()
    per_rank = model.config.num_moe_experts // group.size()
    return slice(group.rank() * per_rank, (group.rank() + 1) * per_rank)


def load_reference(model: torch.nn.Module, spec: ReferenceSpec, start: Weights) -> None:
    """Copy the reference's weights into this rank's shard."""
    experts = local_experts(model)
    group = parallel_state.get_tensor_model_parallel_group()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = to_megatron(spec, start, name, experts)
            dim = tensor_parallel_dim(name, projection_norm=spec.arch == "olmoe")
            if dim is not None:
                value = tensor_parallel_part(name, value, dim, group.rank(), group.size())
            parameter.copy_(value)


def gather(model: torch.nn.Module, spec: ReferenceSpec, values: dict[str, Tensor]) -> Weights:
    """Reference-named values with all experts, from each rank's; a collective."""
    return to_reference(spec, gather_whole(model, values, projection_norm=spec.arch == "olmoe"))


def gather_whole(model: torch.nn.Module, values: dict[str, Tensor], *, projection_norm: bool) -> dict[str, Tensor]:
    """Megatron-named values over all expert and tensor parallel ranks, from each rank's; a collective."""
    expert_parallel = parallel_state.get_expert_model_parallel_group()
    tensor_parallel = parallel_state.get_tensor_model_parallel_group()
    per_rank = model.config.num_moe_experts // expert_parallel.size()
    everything: dict[str, Tensor] = {}
    for name, value in values.items():
        value = value.detach().float().contiguous()
        dim = tensor_parallel_dim(name, projection_norm=projection_norm)
        if "local_experts" in name:
            parts = _of_all_ranks(value, expert_parallel)
            everything |= {all_experts_name(name, rank * per_rank): part for rank, part in enumerate(parts)}
        elif ".experts." in name:
            everything[name] = torch.cat(_of_all_ranks(value, expert_parallel))
        elif dim is not None:
            everything[name] = join_tensor_parallel(name, _of_all_ranks(value, tensor_parallel), dim)
        else:
            everything[name] = value
    return everything


def _of_all_ranks(value: Tensor, group: torch.distributed.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(value) for _ in range(group.size())]
    torch.distributed.all_gather(parts, value, group=group)
    return parts


def full_gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Each parameter's reduced gradient, whole over its ZeRO partitions."""
    return {name: safe_get_full_grad(weight).clone() for name, weight in model.named_parameters()}


def full_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Each parameter's value, whole over its ZeRO partitions."""
    values = {}
    for name, weight in model.named_parameters():
        with GatheredParameters([weight], enabled=hasattr(weight, "ds_id")):
            values[name] = weight.detach().clone()
    return values


def build_engine(spec: ReferenceSpec, case: Case, start: Weights, lr: float, weight_decay: float, clip: float, **ds):
    """The engine of one case, holding the reference's weights."""
    tie = mt.TieConfig(banks=list(spec.banks), lr_divisor=case.lr_divisor, share=spec.share)
    model = mt.build_gpt_model(model_config(spec, case), tie)
    if case.recompute == "non_reentrant":
        for layer in model.decoder.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    load_reference(model, spec, start)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": case.stage, "overlap_comm": case.overlap},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        **ds,
    }
    groups = mt.parameter_groups(model, lr=lr, weight_decay=weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, **HYPERPARAMETERS)
    return mt.initialize(model, config, optimizer=optimizer)[0]


def micro_batch(batch: Tensor, index: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slice `index` of `count` of a global batch [sequences, seq + 1], as GPTModel takes it."""
    rows = batch.chunk(count)[index]
    tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    length = tokens.shape[1]
    mask = torch.ones(length, length).triu(1).bool()[None, None]
    return tokens, torch.arange(length).expand_as(tokens), mask, labels


def step(engine: Any, batch: Tensor, accumulation: int, at_boundary: Any = lambda: None) -> dict[str, float]:
    """One optimizer step on a global batch; calls `at_boundary` between the last backward and the update."""
    data_parallel = parallel_state.get_data_parallel_group()
    world, rank = data_parallel.size(), data_parallel.rank()
    lm_loss = torch.zeros(())
    for index in range(accumulation):
        tokens, positions, mask, labels = micro_batch(batch, index * world + rank, world * accumulation)
        loss = engine(tokens, positions, mask, labels=labels).mean()
        engine.backward(loss)
        lm_loss += loss.detach() / (accumulation * world)
        if index == accumulation - 1:
            at_boundary()
        engine.step()
    torch.distributed.all_reduce(lm_loss, group=data_parallel)
    config = engine.module.config
    moe = take_moe_losses(config, config.num_layers, accumulation)
    return {
        "loss": lm_loss.item() + moe.objective,
        "lm_loss": lm_loss.item(),
        "aux_loss": moe.aux_loss,
        "z_loss": moe.z_loss,
        "grad_norm": float(engine.get_global_grad_norm()),
    }


# For comparisons of the project with itself, where the oracle has no such model.
ROUTING_FIELDS: dict[str, Any] = FIELDS | {"num_layers": 5, "qk_layernorm": False, "moe_aux_loss_coeff": 0.02}


def routing_engine(model: torch.nn.Module, ds: dict[str, Any]) -> Any:
    """An engine with two micro-batches a step. SGD keeps a wrong gradient wrong, where Adam would normalise it away."""
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        **ds,
    }
    groups = mt.parameter_groups(model, lr=1e-2, weight_decay=0.1)
    return mt.initialize(model, settings, optimizer=torch.optim.SGD(groups, lr=1e-2))[0]
