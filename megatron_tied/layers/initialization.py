"""Initial weights that depend on a parameter's name and the seed, never on how the model is sharded.

Megatron-Core draws from one stream per rank: on a CPU host every expert parallel rank then gets the same experts,
and anywhere another EP size gives another model. Here every matrix has a stream of its own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_tied.layers.backends import expert_matrices


@dataclass(frozen=True)
class DepthScaledXavier:
    """Fills a matrix [out, in] uniformly, with gain 1 / sqrt(3 num_layers). Source: "Tying the Loop"."""

    num_layers: int

    def __call__(self, matrix: torch.Tensor, parts: int = 1) -> torch.Tensor:
        """The matrix, which is one of so many equal parts of the one whose rows count."""
        rows, columns = matrix.shape
        bound = math.sqrt(6 / (parts * rows + columns)) / math.sqrt(3 * self.num_layers)
        return torch.nn.init.uniform_(matrix, -bound, bound)


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
            if isinstance(method, DepthScaledXavier) and kind != "down" and config.gated_linear_unit:
                method = partial(method, parts=2)  # gate and up are one matrix to the paper, and to Muon
            initialize_matrix(matrix, method, seed, f"bank.{bank}.expert.{first_expert + local}.{kind}")
