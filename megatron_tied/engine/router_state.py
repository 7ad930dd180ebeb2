"""What routers keep beside their weights: counts that must be taken once, and the bias that follows from them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker, get_updated_expert_bias
from megatron.core.transformer.moe.router import TopKRouter


class RouterState:
    """The routers of one model, found once: a walk over all modules costs more than what is done in a step."""

    def __init__(self, model: torch.nn.Module):
        self._routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
        self._biased = [router for router in self._routers if router.enable_expert_bias]
        self._before: dict[str, torch.Tensor] = {}
        self._after: dict[str, torch.Tensor] = {}

    def before_forward(self) -> None:
        """Note where the counters stand.

        Routers add to their counters whenever autograd records: in forward, and again when recompute runs a layer a
        second time. Megatron-Core's own recompute runs the first time unrecorded, torch's does not. So what forward
        has counted stands, and of what backward counts only the counters that forward left alone.
        """
        self._before = {name: counter.clone() for name, counter in self._counters()}

    def after_forward(self) -> None:
        """Note what forward has counted."""
        self._after = {name: counter.clone() for name, counter in self._counters()}

    def after_backward(self) -> None:
        """Take back what backward has counted again."""
        for name, counter in self._counters():
            if name in self._after:
                after = self._after[name]
                # A loss has no entry before the first forward that computes it.
                before = self._before.get(name, torch.zeros_like(after))
                counter.copy_(torch.where(after == before, counter, after))
        self._before, self._after = {}, {}

    @torch.no_grad()
    def finish_global_batch(self) -> None:
        """Move each `expert_bias` towards even load by the global batch's counts, and start new ones; a collective.

        Auxiliary-loss-free balancing (arXiv:2408.15664), and the running mean of `global_aux_loss`, which is taken
        over the micro-batches of one global batch. Source: `_update_router_expert_bias`, which Megatron's
        `finalize_model_grads` calls and which needs equal numbers of experts in all layers.
        """
        for router in self._biased:
            rate = router.config.moe_router_bias_update_rate
            updated = get_updated_expert_bias(router.local_tokens_per_expert, router.expert_bias, rate)
            router.expert_bias.copy_(updated)
            router.local_tokens_per_expert.zero_()
        for router in self._routers:
            router.reset_global_aux_loss_tracker()

    def _counters(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, entry in get_moe_layer_wise_logging_tracker().items():
            yield name, entry["values"]
        for router in self._biased:
            yield f"tokens of layer {router.layer_number}", router.local_tokens_per_expert
