"""Megatron-Bridge: what a recipe needs, since its YAML files have no key for it and skip those they do not know."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from megatron_tied.topology import TieConfig


def lines_for_recipe(tie: TieConfig, num_layers: int | None) -> Iterator[str]:
    """The lines of Python that tie a recipe's model."""
    default = TieConfig()
    given = {field.name: getattr(tie, field.name) for field in fields(TieConfig)}
    said = ", ".join(f"{name}={value!r}" for name, value in given.items() if value != getattr(default, name))
    layers = "cfg.model.num_layers" if num_layers is None else num_layers
    moe = f"moe_layers(cfg.model.moe_layer_freq, {layers})"
    yield "nothing is added to this file: what reads it skips keys that it does not know, and would train untied"
    yield "with Megatron-Bridge, add to the recipe, where cfg is its ConfigContainer:"
    yield "    from functools import partial"
    yield "    from megatron_tied import TieConfig, TieTopology"
    yield "    from megatron_tied.megatron_lm import tie_experts"
    yield "    from megatron_tied.topology import moe_layers"
    yield f"    topology = TieTopology.build(TieConfig({said}), {layers}, {moe})"
    yield "    cfg.model.register_pre_wrap_hook(partial(tie_experts, topology=topology))"
    if tie.lr_divisor != "none":
        yield (
            "this ties the experts; their learning rate is divided when what cfg.optimizer_config_override_provider "
            "builds is merged with megatron_tied.megatron_lm.bank_learning_rates(optimizer_config, topology)"
        )
    if tie.pipeline == "allreduce":
        yield "megatron_tied.megatron_lm.sum_bank_copies(model_chunks) must follow finalize_model_grads"
