"""Pretraining of Mixture-of-Experts models whose experts are tied across layers, on Megatron-Core and DeepSpeed."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Loaded when first asked for: the command line and the planner must not wait for torch.
_EXPORTS = {
    "ConfigError": "megatron_tied.errors",
    "ModelConfig": "megatron_tied.models.config",
    "TieConfig": "megatron_tied.topology",
    "TieTopology": "megatron_tied.topology",
    "TiedMoEEngine": "megatron_tied.engine.engine",
    "TiedMoELayer": "megatron_tied.layers.moe_layer",
    "build_gpt_model": "megatron_tied.models.gpt",
    "initialize": "megatron_tied.engine.initialize",
    "initialize_model_parallel": "megatron_tied.engine.groups",
    "parameter_groups": "megatron_tied.engine.parameter_groups",
    "tied_decoder_block_spec": "megatron_tied.models.spec",
}
__all__ = [
    "ConfigError",
    "ModelConfig",
    "TieConfig",
    "TieTopology",
    "TiedMoEEngine",
    "TiedMoELayer",
    "build_gpt_model",
    "initialize",
    "initialize_model_parallel",
    "parameter_groups",
    "tied_decoder_block_spec",
]

if TYPE_CHECKING:
    from megatron_tied.engine.engine import TiedMoEEngine
    from megatron_tied.engine.groups import initialize_model_parallel
    from megatron_tied.engine.initialize import initialize
    from megatron_tied.engine.parameter_groups import parameter_groups
    from megatron_tied.errors import ConfigError
    from megatron_tied.layers.moe_layer import TiedMoELayer
    from megatron_tied.models.config import ModelConfig
    from megatron_tied.models.gpt import build_gpt_model
    from megatron_tied.models.spec import tied_decoder_block_spec
    from megatron_tied.topology import TieConfig, TieTopology


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_EXPORTS[name]), name)
    return value
