"""`TiedMoEEngine`: DeepSpeed's engine, told about Megatron-Core's experts and about banks."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_tied.engine.gradient_norm import clip_gradients, global_gradient_norm
from megatron_tied.engine.groups import is_expert_parallel
from megatron_tied.engine.router_state import RouterState
from megatron_tied.layers.accumulation import UseSites
from megatron_tied.layers.banks import describe, gradient_sites
from megatron_tied.layers.moe_layer import tied_layers
from megatron_tied.layers.sharing_layer import sharing_layers


class TiedMoEEngine(DeepSpeedEngine):
    """A `DeepSpeedEngine` for models with tied, expert parallel experts, at ZeRO stages 0 to 3.

    Made by `megatron_tied.initialize`; used like any DeepSpeed engine: `loss = engine(...)`,
    `engine.backward(loss)`, `engine.step()`. What `time_reduction` returns is entered around the reduction of gradients
    that is left when backward has ended.
    """

    time_reduction: Callable[[], AbstractContextManager[None]] = nullcontext

    def _configure_distributed_model(self, model: torch.nn.Module) -> None:
        super()._configure_distributed_model(model)
        # Upstream sets this only for DeepSpeed's own MoE classes; gradient reduction, ZeRO and the gradient norm
        # ask it before they look at expert parameters.
        self.has_moe_layers = any(is_expert_parallel(parameter) for parameter in model.parameters())
        self.num_experts = [layer.config.num_moe_experts for layer in tied_layers(model)]
        self._use_sites = _connect_use_sites(model)
        self._router_state = RouterState(model)

    def _validate_zero3_moe_compatibility(self) -> None:
        """Nothing to do: upstream refuses what is not AutoEP, and `initialize` has looked at its other conditions."""

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The module's forward; in training, what its routers count is noted for `backward`."""
        counts = self.training and torch.is_grad_enabled()
        if counts:
            self._router_state.before_forward()
        output = super().forward(*inputs, **kwargs)
        if counts:
            self._router_state.after_forward()
        return output

    def backward(self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> torch.Tensor:
        """Backward of one micro-batch's loss, aux losses weighted like it; each bank's gradient is handed on once.

        Raises `RuntimeError` if some layers of a tie group took part in this backward pass and others did not: their
        bank's gradient would be incomplete.
        """
        for sites in self._use_sites:
            sites.reset()
        self._set_aux_loss_scale(scale_wrt_gas)
        loss = super().backward(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)
        for sites, bank in self._use_sites.items():
            if not sites.is_complete:
                raise RuntimeError(
                    f"{bank}: only {sites.arrived} of {sites.use_sites} layers had a gradient in this backward pass; "
                    "the loss must depend on all of them"
                )
        self._router_state.after_backward()
        return loss

    def allreduce_gradients(self, *args: Any, **kwargs: Any) -> None:
        """As upstream, which calls it at the end of `backward`."""
        with self.time_reduction():
            super().allreduce_gradients(*args, **kwargs)

    def allreduce_and_copy(
        self,
        small_bucket: list[torch.Tensor],
        dp_group: torch.distributed.ProcessGroup,
        dp_world_size: int | None = None,
    ) -> None:
        """As upstream; a rank that is the only one of its group divides in place, which spares two copies."""
        if torch.distributed.get_world_size(dp_group) > 1:
            super().allreduce_and_copy(small_bucket, dp_group, dp_world_size)
        elif dp_world_size not in (None, 1):
            torch._foreach_div_(small_bucket, dp_world_size)

    def _set_aux_loss_scale(self, scale_wrt_gas: bool) -> None:
        # Megatron's schedules do this; without it aux and z-loss come out too large by the accumulation steps.
        scale = 1.0 / self.gradient_accumulation_steps() if scale_wrt_gas else 1.0
        scale *= self.loss_scale_now()
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(scale, device=self.device))

    def loss_scale_now(self) -> float:
        """The factor that the next backward multiplies losses by: fp16's loss scale, else 1."""
        return float(self._get_optimizer_loss_scale()) if self.fp16_enabled() else 1.0

    def _take_model_step(self, lr_kwargs: dict[str, Any] | None) -> None:
        self._router_state.finish_global_batch()
        if self._is_plain_fp32():
            self._global_grad_norm = global_gradient_norm(self.module.parameters())
            if not math.isfinite(self._global_grad_norm):
                self._skip_step()
                return
        super()._take_model_step(lr_kwargs)

    def _skip_step(self) -> None:
        # What DeepSpeed's ZeRO optimizers and its engine do about a gradient norm that is not finite.
        self.zero_grad()
        self.skipped_steps += 1
        self.global_steps += 1
        self.global_samples += self.train_batch_size()

    def clip_fp32_gradients(self) -> None:
        """Clip by the true global norm; upstream clips by a mean of norms with one rank's experts each."""
        clip_gradients(self.module.parameters(), self._global_grad_norm, self.gradient_clipping())

    def _is_plain_fp32(self) -> bool:
        return not (self.zero_optimization() or self.fp16_enabled() or self.bfloat16_enabled())


def _connect_use_sites(model: torch.nn.Module) -> dict[UseSites, str]:
    """Make every shared weight say when its gradient is whole; returns each count with its bank's name for messages."""
    owners = [(layer.experts, layer.bank) for layer in tied_layers(model) if layer.is_owner]
    owners += [(own, layer.bank) for layer in sharing_layers(model) if layer.is_owner for own, _ in layer.shared()]
    connected = {}
    for module, bank in owners:
        for sites, weights in gradient_sites(module).items():
            sites.on_change = partial(_mark_ready, weights)
            connected[sites] = describe(bank)
    return connected


def _mark_ready(weights: list[torch.nn.Parameter], ready: bool) -> None:
    # ZeRO looks at this when a gradient hook fires, and passes over a gradient that is not ready.
    for weight in weights:
        vars(weight).update(ds_grad_is_ready=ready)
