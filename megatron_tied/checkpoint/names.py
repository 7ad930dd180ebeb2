"""Names of parameters in a checkpoint: those of Megatron-Core's layers without Transformer Engine, whoever wrote it."""

from __future__ import annotations

import re

# Transformer Engine puts a norm into the linear layer behind it: where it is found there, and its own place.
_NORM_OF = {
    "self_attention.linear_qkv": "input_layernorm",
    "mlp.linear_fc1": "pre_mlp_layernorm",
    "self_attention.linear_q_up_proj": "self_attention.q_layernorm",
    "self_attention.linear_kv_up_proj": "self_attention.kv_layernorm",
}
_FUSED = re.compile(rf"(.*\.layers\.\d+\.)({'|'.join(map(re.escape, _NORM_OF))})\.layer_norm_(weight|bias)")


def checkpoint_name(parameter: str) -> str:
    """The name in a checkpoint of the model's parameter `parameter`, routed experts aside."""
    if fused := _FUSED.fullmatch(parameter):
        layer, linear, kind = fused.groups()
        return f"{layer}{_NORM_OF[linear]}.{kind}"
    return parameter


def is_norm(parameter: str) -> bool:
    """Whether the model's parameter `parameter` is the gain or bias of a norm."""
    return checkpoint_name(parameter).endswith(("layernorm.weight", "layernorm.bias"))
