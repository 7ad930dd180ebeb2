"""Builds Megatron-Core's GPTModel with tied experts from our typed configs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.experts import HAVE_TE
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.layers.initialization import DepthScaledXavier
from megatron_tied.models.config import ModelConfig, indivisible
from megatron_tied.models.initialization import initialize_weights
from megatron_tied.models.latent_attention import is_latent
from megatron_tied.models.spec import tied_decoder_block_spec, use_projection_norm, use_qkv_clip
from megatron_tied.topology import TieConfig

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
}
# Options that Megatron-Core would fail on late, in words of its own: (what they need, whether it is here).
HOST_OPTIONS: dict[str, tuple[str, Callable[[], bool]]] = {
    "apply_rope_fusion": ("Transformer Engine", lambda: HAVE_TE),
    "moe_permute_fusion": ("Transformer Engine", lambda: HAVE_TE),
    "moe_router_fusion": ("Transformer Engine", lambda: HAVE_TE),
    "moe_shared_expert_overlap": ("CUDA: it overlaps two streams", torch.cuda.is_available),
}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def transformer_config(model: ModelConfig, *, precision: str = "fp32") -> TransformerConfig:
    """The Megatron-Core config of `model` on this host and in the process groups at hand.

    Raises `ConfigError` for what tensor parallel ranks cannot divide evenly, and for what needs another host.
    """
    on_cpu = not torch.cuda.is_available()
    host = {
        "use_cpu_initialization": on_cpu,
        "masked_softmax_fusion": not on_cpu,
        "bias_activation_fusion": not on_cpu and model.has_fused_activation(),
    }
    tensor_parallel_size = parallel_state.get_tensor_model_parallel_world_size()
    field = "parallel.tensor_model_parallel_size"
    cut = model.cut_by_tensor_parallelism()
    if problems := [*indivisible(field, tensor_parallel_size, cut), *_lacking(model)]:
        raise ConfigError(problems)
    ours = {
        "activation_func": _ACTIVATIONS[model.activation],
        **_init_methods(model),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "tensor_model_parallel_size": tensor_parallel_size,
        "expert_tensor_parallel_size": 1,
        # Megatron-Core trains MoE layers with tensor parallelism in no other way.
        "sequence_parallel": tensor_parallel_size > 1,
        "params_dtype": _DTYPES[precision],
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        # DeepSpeed takes gradients from `.grad`, not from Megatron's fused accumulation buffers.
        "gradient_accumulation_fusion": False,
        # `initialize_weights` fills the model, and does not depend on the sharding.
        "perform_initialization": False,
        # Homogeneous layers cannot hold banks in a distributed checkpoint.
        "hetereogenous_dist_checkpoint": True,
    }
    kwargs = host | model.transformer_kwargs() | ours
    if is_latent(model):
        # There attention has a rotary embedding of its own.
        return MLATransformerConfig(**kwargs, rotary_base=model.rotary_base, rotary_percent=model.rotary_percent)
    return TransformerConfig(**kwargs)


def _init_methods(model: ModelConfig) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    if model.init_method == "normal":
        return {}
    method = DepthScaledXavier(model.num_layers)
    return dict.fromkeys(("init_method", "output_layer_init_method", "embedding_init_method"), method)


def _lacking(model: ModelConfig) -> list[Problem]:
    wanted = model.transformer_kwargs()
    return [
        Problem(f"model.{name}", True, f"must be false on this host: it needs {what}")
        for name, (what, is_here) in HOST_OPTIONS.items()
        if wanted.get(name) and not is_here()
    ]


def build_gpt_model(
    model: ModelConfig,
    tie: TieConfig,
    *,
    seed: int = 1234,
    precision: str = "fp32",
    use_transformer_engine: bool | None = None,
) -> GPTModel:
    """A GPTModel with tied experts, initialised from `seed`, its parameters on this process's device.

    `precision` is fp32, bf16 or fp16: the dtype of the parameters. Megatron-Core's process groups must exist
    (`megatron_tied.engine.initialize_model_parallel`). forward(tokens, position_ids, attention_mask, labels)
    gives the loss per token [batch, sequence]. Raises `ConfigError` for a topology that does not fit the model.
    """
    if model.vocab_size is None:
        raise ConfigError(Problem("model.vocab_size", None, "must be given: the tokenizer's vocabulary size"))
    topology = model.topology(tie)
    config = transformer_config(model, precision=precision)
    # Nothing is drawn from these streams while building; dropout is, in training.
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    block = tied_decoder_block_spec(
        config, topology, use_transformer_engine=use_transformer_engine, expert_backend=model.expert_backend
    )
    gpt = assemble(model, config, block)
    initialize_weights(gpt, config, seed)
    return gpt


def assemble(model: ModelConfig, config: TransformerConfig, block: TransformerBlockSubmodules) -> GPTModel:
    """The GPTModel of a decoder block's spec, which gets OLMoE's norm and clipping here; its weights are not filled."""
    if model.qk_norm_scope == "projection":
        use_projection_norm(block, config.num_attention_heads, config.num_query_groups)
    if model.qkv_clip is not None:
        use_qkv_clip(block, model.qkv_clip)
    return GPTModel(
        config=config,
        transformer_layer_spec=block,
        vocab_size=model.vocab_size,
        # Rotary embeddings set no limit: the table of a learned embedding would be this long.
        max_sequence_length=model.max_position_embeddings or 0,
        position_embedding_type="rope",
        rotary_base=model.rotary_base,
        rotary_percent=model.rotary_percent,
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
    )
