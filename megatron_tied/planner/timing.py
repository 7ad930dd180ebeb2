"""How long a step takes, by a stated model: operations, bytes and bandwidths, and what can hide behind what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_tied.models.config import ModelConfig
from megatron_tied.planner.activations import busiest
from megatron_tied.planner.compute import Flops, recomputed_share
from megatron_tied.planner.hardware import GB, Hardware
from megatron_tied.planner.layout import Layout
from megatron_tied.planner.states import ModelStates
from megatron_tied.planner.traffic import Flow, recomputes_experts
from megatron_tied.topology import TieTopology

# Bytes that an Adam step moves for an element: master, two moments and gradient read, three written, weight written.
_ADAM_BYTES = 30
# Three products read an expert's weights: forward, gradient of the input, gradient of the weights.
_PRODUCTS = 3


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what they go into; communication only as far as nothing hides it."""

    seconds: Mapping[str, float]

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())


def assumptions(hardware: Hardware, layout: Layout) -> list[str]:
    """What the figures of a plan rest on, in sentences."""
    rate, reached = hardware.tflops[layout.precision], hardware.matmul_efficiency
    lines = [
        f"{hardware.name}: {rate:g} TFLOP/s in {layout.precision}, of which matrix products reach {reached:.0%}; "
        f"{hardware.memory_gbs:g} GB/s of memory bandwidth",
        f"{hardware.node_gbs:g} GB/s between ranks of a node of {hardware.ranks_per_node}, "
        f"{hardware.network_gbs:g} GB/s between nodes, of which {hardware.network_efficiency:.0%} are reached; "
        "ranks fill nodes in order",
        f"gradient reduction with overlap_comm, and ZeRO 3 gathers as far as DeepSpeed fetches ahead, hide behind "
        f"{hardware.overlap:.0%} of the computation; all-to-all hides behind nothing; no latencies are counted",
        "fused attention and norms (Transformer Engine)"
        if hardware.fused_kernels
        else "unfused attention: its scores are stored",
        f"{hardware.reserve_gb:g} GB for driver and communication, {hardware.fragmentation:.0%} lost to fragmentation",
    ]
    if layout.expert_parallel > 1:
        lines.append(f"the busiest expert parallel rank gets {layout.imbalance:g} times the mean of the tokens")
    return lines


def step_time(
    model: ModelConfig,
    topology: TieTopology,
    layout: Layout,
    hardware: Hardware,
    flops: Flops,
    states: ModelStates,
    flows: Sequence[Flow],
) -> StepTime:
    """The time of one optimizer step of the whole job."""
    compute = _compute(model, topology, layout, hardware, flops, states)
    seconds = {"compute": compute, "all-to-all": 0.0, "gradients": 0.0, "weights": 0.0, "model parallel": 0.0}
    for flow in flows:
        duration = _duration(flow, hardware)
        if flow.collective == "all-to-all":
            seconds["all-to-all"] += duration * busiest(model, layout)
        elif flow.group in ("tensor", "pipeline"):
            seconds["model parallel"] += duration
        else:
            seconds[flow.purpose.split()[-1]] += duration
    hiding = compute * hardware.overlap
    if layout.zero_stage < 2:
        # Only the last micro-batch's gradients are reduced.
        hiding /= layout.accumulation
    # At stages 1 and 2 the updated weights are needed before the next step begins.
    hideable = {"gradients": layout.overlaps, "weights": layout.zero_stage == 3 and states.gathered.prefetches}
    for name, can_hide in hideable.items():
        if can_hide:
            hidden = min(seconds[name], hiding)
            seconds[name] -= hidden
            hiding -= hidden
    seconds["optimizer"] = _optimizer(layout, hardware, states)
    waiting = (layout.pipeline_parallel - 1) / layout.accumulation
    seconds["pipeline bubble"] = waiting * (compute + seconds["all-to-all"] + seconds["model parallel"])
    return StepTime({name: value for name, value in seconds.items() if value > 0})


def _compute(
    model: ModelConfig, topology: TieTopology, layout: Layout, hardware: Hardware, flops: Flops, states: ModelStates
) -> float:
    """Products at the reached rate, and experts no faster than their weights can be read."""
    tokens = layout.tokens * layout.accumulation
    # The slowest pipeline stage has this part of the layers.
    share = model.num_layers / max(map(len, layout.stages(topology)))
    again = recomputed_share(flops, layout.recompute, model.num_layers)
    passes = 3 + again
    rate = hardware.tflops[layout.precision] * 1e12 * hardware.matmul_efficiency
    in_experts = passes * flops.experts / share * tokens * busiest(model, layout) / rate
    # Every use site reads the bank, tied or not.
    uses = len(topology.moe_layers) / max(1, len(topology.banks))
    products = _PRODUCTS + (1 if recomputes_experts(layout) else 0)
    read = states.parameters.get("bank", 0) * uses * layout.width * products * layout.accumulation
    rest = passes * (flops.forward - flops.experts) / share * tokens / rate
    return rest + max(in_experts, read / (hardware.memory_gbs * GB))


def _duration(flow: Flow, hardware: Hardware) -> float:
    between = flow.between_nodes(hardware.ranks_per_node)
    inside = flow.wire - between if flow.collective == "all-to-all" else flow.wire
    slowest = max(inside / hardware.node_gbs, between / hardware.network_gbs)
    return slowest / (GB * hardware.network_efficiency)


def _optimizer(layout: Layout, hardware: Hardware, states: ModelStates) -> float:
    elements = sum(states.partitions)
    moved = 0.0
    if layout.offload_parameters:
        # What a rank gives to a gather it reads from the host each time.
        gathered = states.gathered
        given = gathered.dense / layout.data_parallel + gathered.bank / layout.expert_data_parallel
        moved += given * layout.width * layout.accumulation
    if not layout.offload_optimizer:
        return elements * _ADAM_BYTES / (hardware.memory_gbs * GB) + moved / (hardware.host_gbs * GB)
    # Each micro-batch's gradients go to the host; those so far come back first to be added to; at last the weights.
    moved += elements * layout.width * 2 * layout.accumulation
    return elements / (hardware.host_adam_gelements * GB) + moved / (hardware.host_gbs * GB)
