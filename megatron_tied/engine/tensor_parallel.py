"""Gradients of whole parameters that a tensor parallel rank computes from a part of the sequence or of the heads."""

from __future__ import annotations

import torch
from megatron.core import parallel_state


def sum_partial_gradients(model: torch.nn.Module) -> None:
    """Sum over tensor parallel ranks, in every backward pass, the gradients that are parts of a sum.

    They are those of norms, routers and biases behind row parallel layers, which Megatron-Core marks
    `sequence_parallel`; upstream sums them at the end of a step (`_allreduce_non_tensor_model_parallel_grads`). A
    hook on the parameter runs before DeepSpeed's, so that it holds at every ZeRO stage. To be called before the engine
    is made; a second call changes nothing. Raises `RuntimeError` for a model without marks.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return
    partial = [parameter for parameter in model.parameters() if getattr(parameter, "sequence_parallel", False)]
    if not partial:
        raise RuntimeError(
            "no parameter carries Megatron-Core's sequence_parallel mark: the model was built without sequence "
            "parallelism, or a conversion has replaced its Parameters. Build it again in the present process groups."
        )

    def summed(gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total

    for parameter in partial:
        if parameter.requires_grad and not hasattr(parameter, "partial_gradient_hook"):
            hook = parameter.register_hook(summed)
            vars(parameter).update(partial_gradient_hook=hook)
