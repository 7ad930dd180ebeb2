"""Shims for hosts without Transformer Engine, where Megatron-Core 0.16 uses names that only its import defines."""

from __future__ import annotations

from importlib.util import find_spec


def is_needed() -> bool:
    """True where Transformer Engine is not installed."""
    return find_spec("transformer_engine") is None


def install_shims() -> None:
    """Install every shim of this module, once."""
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    # The router compares this name with None before it multiplies.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None

    # It takes the import of its own extension for one of Transformer Engine, and asks whether a layer is a None.
    multi_latent_attention.HAVE_TE = False

    # Its default, fp8=False, means "ask Transformer Engine whether fp8 is on": layernorm recompute uses it.
    original = CheckpointWithoutOutput.__init__

    def without_fp8(self: CheckpointWithoutOutput, fp8: object = None) -> None:
        original(self, fp8=None)

    CheckpointWithoutOutput.__init__ = without_fp8
