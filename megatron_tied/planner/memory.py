"""Memory of one rank through a step: model states, activations, buffers; its highest point and what makes it up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_tied.models.config import ModelConfig
from megatron_tied.planner.activations import (
    Kernels,
    LayerActivations,
    layer_activations,
    loss_activations,
    recomputed,
    routed_tokens,
)
from megatron_tied.planner.layout import Layout
from megatron_tied.planner.sharding import local_size
from megatron_tied.planner.states import ModelStates, model_states, update_bytes
from megatron_tied.planner.tensors import bank_tensors
from megatron_tied.topology import Bank, TieTopology

_FP32 = 4


@dataclass(frozen=True)
class Reserve:
    """What a device needs beside the tensors: bytes for the driver and communication, and a share of all tensors
    that the allocator cannot use for fragmentation."""

    fixed: int = 0
    share: float = 0.0


_NO_RESERVE = Reserve()


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the fullest rank at the highest point of a step.

    activations: saved for backward, and the gradients of activations that are at work. buffers: communication
    buckets and gathered parameters. step_extra: what the optimizer adds if the update is the highest point, when no
    activations are there.
    """

    states: ModelStates
    activations: int
    buffers: int
    step_extra: int
    reserve: int
    stage: int

    @property
    def tensors(self) -> int:
        """All of it but the reserve: what an allocator reports as its peak."""
        return self.states.device + self.activations + self.buffers + self.step_extra

    @property
    def total(self) -> int:
        """Bytes that a device must have."""
        return self.tensors + self.reserve

    @property
    def parts(self) -> Mapping[str, int]:
        """The total, taken apart."""
        return {
            "weights": self.states.weights,
            "gradients": self.states.gradients,
            "optimizer": self.states.optimizer,
            "activations": self.activations,
            "buffers": self.buffers,
            "update": self.step_extra,
            "reserve": self.reserve,
        }


def memory_plan(
    model: ModelConfig,
    topology: TieTopology,
    layout: Layout,
    *,
    vocab_size: int,
    kernels: Kernels,
    reserve: Reserve = _NO_RESERVE,
    states: Sequence[ModelStates] | None = None,
) -> MemoryPlan:
    """The memory of the fullest rank. `states` per pipeline stage may be given where they are known already.

    Sources: DeepSpeed's `stage_1_and_2.py` and `stage3.py` for what they allocate, `activations` for the rest.
    """
    plans = []
    for stage, layers in enumerate(layout.stages(topology)):
        of_stage = states[stage] if states else model_states(model, topology, layout, layers, vocab_size)
        plans.append(_Stage(model, topology, layout, layers, vocab_size, kernels, of_stage).plan(stage, reserve))
    return max(plans, key=lambda plan: plan.total)


class _Stage:
    """One pipeline stage's rank, walked through a step."""

    def __init__(
        self,
        model: ModelConfig,
        topology: TieTopology,
        layout: Layout,
        layers: range,
        vocab_size: int,
        kernels: Kernels,
        states: ModelStates,
    ):
        self.model, self.topology, self.layout, self.layers = model, topology, layout, layers
        self.states, self.kernels = states, kernels
        kinds: dict[int | None, LayerActivations] = {}
        self.activations: dict[int, LayerActivations] = {}
        for layer in layers:
            is_moe = topology.bank_of_layer[layer] is not None
            experts = topology.num_experts(layer, model.num_moe_experts) if is_moe else None
            if experts not in kinds:
                kinds[experts] = layer_activations(model, topology, layout, layer, kernels)
            self.activations[layer] = kinds[experts]
        self.loss = loss_activations(model, layout, vocab_size, kernels)
        self.is_last = layers.stop == model.num_layers

    def plan(self, stage: int, reserve: Reserve) -> MemoryPlan:
        """The highest of two points: somewhere in backward, or the optimizer's update."""
        layout, states = self.layout, self.states
        buffers = self._buffers()
        peak = states.weights + states.optimizer + buffers + self._highest_in_backward(stage)
        at_update = states.weights + states.optimizer + self._highest_in_update()
        if at_update > peak and not layout.offload_optimizer:
            activations, step_extra, buffers = 0, at_update - states.device, 0
        else:
            activations, step_extra = peak - states.device - buffers, 0
        tensors = states.device + activations + buffers + step_extra
        return MemoryPlan(states, activations, buffers, step_extra, int(reserve.fixed + reserve.share * tensors), stage)

    def _highest_in_backward(self, stage: int) -> int:
        """Gradients and activations where their sum is highest, from the loss back to the first layer."""
        layout, recompute = self.layout, self.layout.recompute
        total = self.model.num_layers
        kept = {layer: self._kept(layer) for layer in self.layers}
        # Under 1F1B scheduling a stage has as many micro-batches under way as stages follow it, itself included.
        under_way = min(layout.pipeline_parallel - stage, layout.accumulation)
        below = sum(kept.values()) * (under_way - 1)
        saved = sum(kept.values())
        accumulates = layout.zero_stage < 2 and layout.accumulation > 1
        grows = layout.zero_stage < 2 and not accumulates
        gradients = 0 if grows else self.states.gradients
        highest = below + saved + gradients
        if self.is_last:
            highest += self.loss.saved + self.loss.extra
            saved += self.loss.saved
        waiting: dict[Bank, int] = {}
        for layer in reversed(self.layers):
            one = self.activations[layer]
            gradients += self.states.layer_gradients[layer] if grows else 0
            # The loss's own go when the last layer's backward begins.
            saved -= self.loss.saved if self.is_last and layer == self.layers[-1] else 0
            bank = self._bank(layer)
            if bank is not None and self._fuses(bank):
                waiting[bank] = waiting.get(bank, 0) + one.weight_gradient_inputs
            again = recomputed(self.activations, layer, recompute, total)
            now = below + saved + gradients + again + one.backward + sum(waiting.values()) + self._fresh(layer)
            if bank in waiting and layer == bank.owner:
                now += self._concatenated(bank)
                del waiting[bank]
            highest = max(highest, now)
            saved -= kept[layer]
        return highest

    def _bank(self, layer: int) -> Bank | None:
        return None if self.topology.bank_of_layer[layer] is None else self.topology.bank(layer)

    def _fuses(self, bank: Bank) -> bool:
        if self.model.expert_backend != "grouped":
            return False
        experts = self.topology.num_experts(bank, self.model.num_moe_experts) // self.layout.expert_parallel
        return self.topology.fuses_weight_gradient(bank, routed_tokens(self.model, self.layout) / experts)

    def _concatenated(self, bank: Bank) -> int:
        """Bytes of the copy of all its layers' tokens that a bank's weight gradient is made of in one product."""
        if self.kernels.adding_product:
            return 0
        return sum(self.activations[layer].largest_gradient_inputs for layer in bank.layers if layer in self.layers)

    def _kept(self, layer: int) -> int:
        recompute = self.layout.recompute
        segment = recompute.segment(layer, self.model.num_layers)
        one = self.activations[layer]
        if segment:
            return one.input if layer == segment[0] else 0
        return one.kept(recompute.modules)

    def _fresh(self, layer: int) -> int:
        """Bytes of weight gradients and copies at work in a layer's backward beside the gradients that stay."""
        layout, states = self.layout, self.states
        bank = self._bank(layer)
        if bank is None:
            return 0
        # A fused gradient is made once, at the owner, as an untied layer's is.
        fuses = self._fuses(bank)
        if fuses and layer != bank.owner:
            return 0
        collects = bank.is_tied and not fuses
        grows = layout.zero_stage < 2 and layout.accumulation == 1
        # The largest of a bank's products; the others are made after it has been added or reduced.
        experts = self.topology.num_experts(bank, self.model.num_moe_experts)
        weights = bank_tensors(self.model, bank, experts)
        product = 0 if grows and not collects else max(local_size(tensor, layout) for tensor in weights)
        # The sum over the uses so far.
        collected = states.banks[bank.index] if collects and not grows else 0
        if layout.zero_stage < 2 or layout.expert_data_parallel == 1:
            return (product + collected) * layout.width
        # What is reduced is made flat first: of a tied bank that is its sum, when the last product has gone into it.
        made = product if collects else 2 * product
        # At stage 3 what is gathered has come in one flat piece.
        fetched = states.banks[bank.index] if layout.zero_stage == 3 else 0
        return (max(made, fetched) + collected) * layout.width

    def _buffers(self) -> int:
        layout = self.layout
        if layout.zero_stage == 0:
            return 0
        bucket = layout.reduce_bucket_size * layout.width
        if layout.zero_stage < 3:
            # On its way to the host a gradient passes through a buffer as large as the largest.
            passing = self.states.largest_tensor * layout.width if layout.offload_optimizer else 0
            return bucket * (2 if layout.overlaps else 1) + passing
        return bucket + self.states.gathered.live * layout.width

    def _highest_in_update(self) -> int:
        """Gradients and temporaries where their sum is highest, group after group.

        A group's gradient is made flat and fp32. All groups' gradients lie in one buffer at stages 1 and 2, which goes
        with the last group.
        """
        layout, parts = self.layout, self.states.partitions
        updates = [update_bytes(*group) for group in zip(parts, self.states.by_muon, strict=True)]
        if layout.zero_stage == 0:
            without = [update - _FP32 * part for update, part in zip(updates, parts, strict=True)]
            return self.states.gradients + max(without)
        held = sum(parts) * layout.width
        convert = _FP32 + (layout.width if layout.width != _FP32 else 0)
        if layout.zero_stage == 3:
            most = layout.sub_group_size
            return held + max(
                update_bytes(min(part, most), by_muon) for part, by_muon in zip(parts, self.states.by_muon, strict=True)
            )
        return max(held + max(updates[:-1], default=0), held + parts[-1] * convert, updates[-1])
