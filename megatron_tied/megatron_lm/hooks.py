"""Where Megatron-LM's training scripts learn of expert banks: the one list that launcher and source patches share.

Every hook wraps one function of `megatron.training` or of the script's builders. The launcher wraps it in memory, a
source patch writes the same call into the tree: `@hooks.NAME` above the function, or `f = hooks.NAME(f)` for a name
that the file imports. Nothing here may import torch or Megatron at the top: a patched tree imports this module in
the middle of its own imports. Every wrapper leaves a run without `--moe-tie-group-size` or `--moe-tie-banks` as it is.
"""

from __future__ import annotations

import functools
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.core.optimizer.optimizer_config import OptimizerConfig, ParamKey
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

Function = Callable[..., Any]

_MARK = "_megatron_tied"  # of a function that is wrapped


@dataclass(frozen=True)
class Hook:
    """`wrapper` of this module around the function `name` of `module`, a dotted name in a Megatron-LM tree.

    Not every version has all of them. above: for a name that `module` imports, the function in it above whose
    definition the wrapped name is bound.
    """

    module: str
    name: str
    wrapper: str
    above: str | None = None


# From 0.19 on, `pretrain_gpt.py` builds the model here rather than in `gpt_builders` and `get_model`.
_MODEL = "megatron.training.models.gpt"
HOOKS = (
    Hook("megatron.training.arguments", "_add_moe_args", "with_tie_arguments"),
    Hook("megatron.training.arguments", "validate_args", "with_tie_checks"),
    Hook("megatron.training.yaml_arguments", "validate_yaml", "with_yaml_checks"),
    Hook("gpt_builders", "get_gpt_decoder_block_spec", "with_tied_layers", above="gpt_builder"),
    Hook(
        "gpt_builders",
        "get_transformer_block_with_experimental_attention_variant_spec",
        "with_tied_layers",
        above="gpt_builder",
    ),
    Hook(_MODEL, "get_gpt_decoder_block_spec", "with_tied_layers", above="default_layer_spec"),
    Hook(
        _MODEL,
        "get_transformer_block_with_experimental_attention_variant_spec",
        "with_tied_layers",
        above="default_layer_spec",
    ),
    Hook(_MODEL, "unimodal_build_distributed_models", "with_tied_chunks", above="default_layer_spec"),
    Hook("megatron.training.training", "get_model", "with_tied_chunks"),
    Hook("megatron.training.training", "get_megatron_optimizer_config", "with_bank_learning_rates"),
    Hook("megatron.training.training", "finalize_model_grads", "with_bank_copies_summed", above="get_model"),
    Hook(
        "megatron.training.theoretical_memory_usage", "compute_weight_and_optimizer_memory", "with_banks_counted_once"
    ),
    Hook("megatron.training.checkpointing", "_load_base_checkpoint", "with_banks_compared"),
)


def is_hooked(function: Function) -> bool:
    """Whether `function` is what one of these wrappers has returned."""
    return hasattr(function, _MARK)


def _hook(wrapper: Function) -> Callable[[Function], Function]:
    """Makes `wrapper(function, *args, **kwargs)` a decorator that wraps a function once."""

    @functools.wraps(wrapper)
    def decorate(function: Function) -> Function:
        if is_hooked(function):
            return function
        hooked = functools.wraps(function)(functools.partial(wrapper, function))
        setattr(hooked, _MARK, True)
        return hooked

    return decorate


@_hook
def with_tie_arguments(add_moe_args: Function, parser: ArgumentParser) -> ArgumentParser:
    """Adds the `--moe-tie-*` flags."""
    from megatron_tied.megatron_lm.arguments import add_tie_arguments

    return add_tie_arguments(add_moe_args(parser))


@_hook
def with_tie_checks(validate: Function, args: Namespace, *more: Any, **kwargs: Any) -> Any:
    """Refuses what contradicts the topology, and aligns the pipeline's stages with the tie groups."""
    from megatron_tied.megatron_lm.validation import check_and_align, check_resolved

    check_and_align(args)
    validated = validate(args, *more, **kwargs)
    check_resolved(args)
    return validated


@_hook
def with_yaml_checks(validate: Function, args: Namespace, *more: Any, **kwargs: Any) -> Any:
    """Refuses what contradicts the topology of a `--yaml-cfg` file, whose sections Megatron-LM makes one namespace."""
    from megatron_tied.megatron_lm.validation import check_resolved

    validated = validate(args, *more, **kwargs)
    check_resolved(validated)
    return validated


@_hook
def with_tied_layers(
    block_spec: Function, config: TransformerConfig, *args: Any, **kwargs: Any
) -> TransformerBlockSubmodules:
    """Puts `TiedMoELayer` in the layers of a decoder block's spec."""
    from megatron.training import get_args

    from megatron_tied.megatron_lm.arguments import ties, topology_from_args

    spec = block_spec(config, *args, **kwargs)
    if not ties(get_args()):
        return spec
    from megatron_tied.models.spec import tie_layer_specs

    return tie_layer_specs(spec, config, topology_from_args(get_args()), vp_stage=kwargs.get("vp_stage"))


@_hook
def with_tied_chunks(get_model: Function, provider: Function, *args: Any, **kwargs: Any) -> Any:
    """Ties the model chunks after they are built and before they are cast and wrapped: a pre-wrap hook."""
    from megatron.training import get_args

    from megatron_tied.megatron_lm.arguments import ties, topology_from_args

    if not ties(get_args()):
        return get_model(provider, *args, **kwargs)
    from megatron_tied.megatron_lm.tie import tie_experts

    topology = topology_from_args(get_args())
    chunks: list[MegatronModule] = []
    is_pipeline = get_args().pipeline_model_parallel_size > 1
    count = (is_pipeline and get_args().virtual_pipeline_model_parallel_size) or 1

    def provide(*provider_args: Any, **provider_kwargs: Any) -> MegatronModule:
        chunks.append(provider(*provider_args, **provider_kwargs))
        # Banks may span the chunks of this stage: they are tied when the last one is there.
        if len(chunks) == count:
            tie_experts(chunks, topology)
        return chunks[-1]

    return get_model(provide, *args, **kwargs)


@_hook
def with_bank_learning_rates(
    optimizer_config: Function, args: Namespace
) -> tuple[OptimizerConfig, dict[ParamKey, dict[str, Any]] | None]:
    """Divides the learning rates of tied banks."""
    from megatron_tied.megatron_lm.arguments import ties, topology_from_args

    config, overrides = optimizer_config(args)
    if not ties(args):
        return config, overrides
    from megatron_tied.megatron_lm.learning_rate import bank_learning_rates

    return config, {**(overrides or {}), **bank_learning_rates(config, topology_from_args(args))}


@_hook
def with_bank_copies_summed(finalize: Function, model: list[MegatronModule], *args: Any, **kwargs: Any) -> Any:
    """Sums the gradients of banks of which several pipeline stages hold a copy."""
    from megatron.training import get_args

    from megatron_tied.megatron_lm.arguments import ties

    finalized = finalize(model, *args, **kwargs)
    if ties(get_args()):
        from megatron_tied.megatron_lm.copies import sum_bank_copies

        sum_bank_copies(model)
    return finalized


@_hook
def with_banks_counted_once(weight_memory: Function, args: Namespace, *more: Any, **kwargs: Any) -> Any:
    """The theoretical memory report, with the experts of a bank counted once."""
    from megatron_tied.megatron_lm.arguments import ties

    if not ties(args):
        return weight_memory(args, *more, **kwargs)
    from megatron_tied.megatron_lm.theoretical_memory import counting_banks_once

    with counting_banks_once(args):
        return weight_memory(args, *more, **kwargs)


@_hook
def with_banks_compared(
    load_base: Function, load_dir: str, args: Namespace, *more: Any, **kwargs: Any
) -> tuple[Any, ...]:
    """Refuses a checkpoint of other banks, by the arguments that are saved in it: before any tensor is looked for."""
    import torch

    from megatron_tied.megatron_lm.validation import check_same_banks

    loaded: tuple[Any, ...] = load_base(load_dir, args, *more, **kwargs)
    state = loaded[0]
    # Before there are process groups, --use-checkpoint-args takes the model's shape from it, not yet the model.
    if state and "args" in state and torch.distributed.is_initialized():
        check_same_banks(args, state["args"])
    return loaded
