"""Parameters that training leaves as they are."""

from __future__ import annotations

from collections.abc import Collection

import torch

from megatron_tied.checkpoint.names import is_norm


def freeze(model: torch.nn.Module, kinds: Collection[str]) -> None:
    """Take the parameters of `kinds`, as `optimizer.freeze` names them, out of training."""
    if "norms" in kinds:
        for name, parameter in model.named_parameters():
            if is_norm(name):
                parameter.requires_grad_(False)
