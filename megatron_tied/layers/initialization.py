"""Initial weights that depend on a parameter's name and the seed, never on how the model is sharded.

Megatron-Core draws from one stream per rank: on a CPU host every expert parallel rank then gets the same experts,
and anywhere another EP size gives another model. Here every matrix has a stream of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_tied.layers.backends import expert_matrices


def initialize_matrix(matrix: torch.Tensor, method: Callable[[torch.Tensor], object], seed: int, name: str) -> None:
    """Fill `matrix` in place with `method`'s float32 draw from the stream of (`seed`, `name`)."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    drawn = torch.empty(matrix.shape, dtype=torch.float32)
    # The init methods of a TransformerConfig take no generator: lend them the host's default one.
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(int.from_bytes(digest, "big") >> 1)
    try:
        method(drawn)
    finally:
        torch.set_rng_state(state)
    with torch.no_grad():
        matrix.copy_(drawn)


def initialize_experts(
    experts: torch.nn.Module, config: TransformerConfig, *, seed: int, bank: int, first_expert: int
) -> None:
    """Fill the local experts of `bank`; local expert 0 is the global expert `first_expert`."""
    for local, matrices in enumerate(expert_matrices(experts)):
        for kind, matrix in matrices.items():
            method = config.output_layer_init_method if kind == "down" else config.init_method
            initialize_matrix(matrix, method, seed, f"bank.{bank}.expert.{first_expert + local}.{kind}")
