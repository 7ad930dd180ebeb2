"""Tied experts in Megatron-LM's own training: its DDP, distributed optimizer, pipeline and checkpoints."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Loaded when first asked for: a patched Megatron-LM imports this package in the middle of its own imports.
_EXPORTS = {
    "add_tie_arguments": "megatron_tied.megatron_lm.arguments",
    "bank_learning_rates": "megatron_tied.megatron_lm.learning_rate",
    "sum_bank_copies": "megatron_tied.megatron_lm.copies",
    "tie_experts": "megatron_tied.megatron_lm.tie",
    "topology_from_args": "megatron_tied.megatron_lm.arguments",
}
__all__ = ["add_tie_arguments", "bank_learning_rates", "sum_bank_copies", "tie_experts", "topology_from_args"]

if TYPE_CHECKING:
    from megatron_tied.megatron_lm.arguments import add_tie_arguments, topology_from_args
    from megatron_tied.megatron_lm.copies import sum_bank_copies
    from megatron_tied.megatron_lm.learning_rate import bank_learning_rates
    from megatron_tied.megatron_lm.tie import tie_experts


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_EXPORTS[name]), name)
    return value
