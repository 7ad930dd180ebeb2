"""From a TransformerConfig and a topology to the ModuleSpec of a decoder block with tied experts."""

from __future__ import annotations

import copy

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.moe.experts import HAVE_TE
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.layers.attention import ClippedSelfAttention, ProjectionRMSNorm
from megatron_tied.layers.backends import experts_spec
from megatron_tied.layers.banks import ExpertBanks
from megatron_tied.layers.core_attention import ScaledDotProductAttention
from megatron_tied.layers.core_attention import unsupported_options as attention_options
from megatron_tied.layers.grouped_experts import unsupported_options
from megatron_tied.layers.latent_attention import LatentSelfAttention
from megatron_tied.layers.moe_layer import TiedMoELayer
from megatron_tied.layers.norm import TorchNorm
from megatron_tied.layers.sharing_layer import SharingLayer
from megatron_tied.platform.specs import Spec, spec_like, submodules_of
from megatron_tied.topology import TieTopology


def tied_decoder_block_spec(
    config: TransformerConfig,
    topology: TieTopology,
    *,
    use_transformer_engine: bool | None = None,
    expert_backend: str = "grouped",
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """Megatron-Core's decoder block spec with a `TiedMoELayer` in every MoE layer.

    `use_transformer_engine=None` uses it where it is installed; `vp_stage` is the model chunk of an interleaved
    pipeline. Raises `ConfigError` if the topology was made for another number of layers, or for options that the
    expert backend does not have. Source: `get_gpt_decoder_block_spec`.
    """
    # Told here: an error from inside Megatron-Core's building of modules comes out as another one.
    if expert_backend == "grouped" and (problems := unsupported_options(config)):
        raise ConfigError(problems)
    use_te = HAVE_TE if use_transformer_engine is None else use_transformer_engine
    # The experts are replaced below: spare upstream its warning about a grouped MLP that it no longer maintains.
    upstream = copy.copy(config)
    upstream.moe_grouped_gemm = False
    block = get_gpt_decoder_block_spec(
        upstream, use_transformer_engine=use_te, normalization=config.normalization, vp_stage=vp_stage
    )
    tie_layer_specs(block, config, topology, vp_stage=vp_stage, experts=experts_spec(expert_backend))
    _allow_sequence_parallel_norms(block)
    if not use_te:
        _use_own_attention(block, config)
    return block


def tie_layer_specs(
    block: TransformerBlockSubmodules,
    config: TransformerConfig,
    topology: TieTopology,
    *,
    vp_stage: int | None = None,
    experts: Spec | None = None,
) -> TransformerBlockSubmodules:
    """Put a `TiedMoELayer` in every MoE layer of a decoder block's spec, which is one model chunk; returns `block`.

    `experts` replaces the spec's own. Upstream's layer specs are one shared object: each is copied before it is
    edited. Raises `ConfigError` if the topology was made for another number of layers.
    """
    if topology.num_layers != config.num_layers:
        valid = f"the topology is made for {topology.num_layers} layers: build it for the same number"
        raise ConfigError(Problem("model.num_layers", config.num_layers, valid))
    banks = ExpertBanks(topology)
    first = get_transformer_layer_offset(config, vp_stage)
    block.layer_specs = [
        _tied_layer(spec, first + index, banks, experts) for index, spec in enumerate(block.layer_specs)
    ]
    return block


def _tied_layer(layer: ModuleSpec, index: int, banks: ExpertBanks, experts: Spec | None) -> ModuleSpec:
    layer = copy.deepcopy(layer)
    if banks.topology.bank_of_layer[index] is None:
        return layer
    submodules = copy.copy(submodules_of(layer.submodules.mlp))
    if experts is not None:
        submodules.experts = experts
    layer.submodules.mlp = spec_like(layer.submodules.mlp, TiedMoELayer, submodules, banks=banks, layer_index=index)
    if banks.topology.shares_more and banks.topology.bank(index).is_tied:
        layer.module = SharingLayer
        layer.params = {**layer.params, "banks": banks, "layer_index": index}
    return layer


def _allow_sequence_parallel_norms(block: TransformerBlockSubmodules) -> None:
    parts = [block]
    for layer in block.layer_specs:
        parts += [layer.submodules, layer.submodules.self_attention.submodules]
    for part in parts:
        for name, module in vars(part).items():
            if module is WrappedTorchNorm:
                setattr(part, name, TorchNorm)


def _use_own_attention(block: TransformerBlockSubmodules, config: TransformerConfig) -> None:
    for layer in block.layer_specs:
        attention = layer.submodules.self_attention
        if config.multi_latent_attention:
            attention.module = LatentSelfAttention
        # Upstream's keeps every score, and wants values as wide as keys.
        if config.multi_latent_attention or not attention_options(config):
            attention.submodules.core_attention = ScaledDotProductAttention


def use_projection_norm(block: TransformerBlockSubmodules, heads: int, query_groups: int) -> None:
    """Normalise query and key over the whole projection instead of per head, in every layer of `block`."""
    for layer in block.layer_specs:
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm = ModuleSpec(module=ProjectionRMSNorm, params={"heads": heads})
        attention.k_layernorm = ModuleSpec(module=ProjectionRMSNorm, params={"heads": query_groups})


def use_qkv_clip(block: TransformerBlockSubmodules, qkv_clip: float) -> None:
    """Clamp query, key and value to [-qkv_clip, qkv_clip] in every layer of `block`."""
    for layer in block.layer_specs:
        attention = layer.submodules.self_attention
        attention.module = ClippedSelfAttention
        attention.params = {**attention.params, "qkv_clip": qkv_clip}
