"""What one rank sends and receives in an optimizer step, by purpose, as DeepSpeed 0.19 and Megatron-Core 0.16 do it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from megatron_tied.models.config import ModelConfig
from megatron_tied.planner.layout import Layout
from megatron_tied.planner.states import ModelStates
from megatron_tied.topology import TieTopology

Collective = Literal["all-reduce", "reduce-scatter", "all-gather", "all-to-all", "send"]
Group = Literal["data", "expert data", "expert", "tensor", "pipeline"]


class Flow(NamedTuple):
    """One kind of traffic of one rank in a step.

    payload: bytes of the whole tensors that collectives are called with. ranks: of the group. stride: between
    neighbours of the group, in ranks of the job.
    """

    purpose: str
    collective: Collective
    group: Group
    ranks: int
    stride: int
    payload: int

    @property
    def wire(self) -> int:
        """Bytes that leave this rank, by ring algorithms and pairwise exchange."""
        if self.collective == "send":
            return self.payload
        rounds = 2 if self.collective == "all-reduce" else 1
        return self.payload * rounds * (self.ranks - 1) // self.ranks

    def between_nodes(self, ranks_per_node: int) -> int:
        """The part of `wire` that leaves the node, if ranks fill nodes in order."""
        inside = self._ranks_in_a_node(ranks_per_node)
        if inside >= self.ranks:
            return 0
        if self.collective == "all-to-all":
            return self.payload * (self.ranks - inside) // self.ranks
        # A ring goes through each node once: of its ranks one sends to the next node, on behalf of all.
        return self.wire // inside

    def _ranks_in_a_node(self, ranks_per_node: int) -> int:
        return max(1, min(self.ranks, ranks_per_node // self.stride))


def step_traffic(
    model: ModelConfig, topology: TieTopology, layout: Layout, layers: range, states: ModelStates
) -> list[Flow]:
    """All traffic of a step, of a rank in the pipeline stage with `layers`; groups of one rank send nothing."""
    flows = [
        *_gradients(states, layout),
        *_weights(states, layout),
        *_experts(model, topology, layout, layers),
        *_tensor_parallel(model, topology, layout, layers),
        *_pipeline(model, topology, layout, states),
    ]
    return [flow for flow in flows if flow.ranks > 1 and flow.payload]


def _data_groups(layout: Layout) -> list[tuple[bool, str, Group, int, int]]:
    """(experts?, their name, group, its ranks, their stride), for the dense weights and for the banks."""
    return [
        (False, "dense", "data", layout.data_parallel, layout.tensor_parallel),
        (True, "bank", "expert data", layout.expert_data_parallel, layout.expert_parallel),
    ]


def _gradients(states: ModelStates, layout: Layout) -> Iterator[Flow]:
    collective: Collective = "reduce-scatter" if layout.zero_stage == 3 else "all-reduce"
    # Stages 2 and 3 keep partitions only, so that each micro-batch's gradients are reduced.
    times = layout.accumulation if layout.zero_stage >= 2 else 1
    for experts, name, group, ranks, stride in _data_groups(layout):
        payload = _elements(states, experts) * layout.width * times
        yield Flow(f"{name} gradients", collective, group, ranks, stride, payload)


def _weights(states: ModelStates, layout: Layout) -> Iterator[Flow]:
    if layout.zero_stage == 0:
        return
    gathered = states.gathered
    for experts, name, group, ranks, stride in _data_groups(layout):
        elements = _elements(states, experts)
        if layout.zero_stage == 3:
            once = gathered.kept_bank if experts else gathered.kept_dense
            each = gathered.bank if experts else gathered.dense
            elements = once + each * layout.accumulation
        yield Flow(f"{name} weights", "all-gather", group, ranks, stride, elements * layout.width)


def _elements(states: ModelStates, experts: bool) -> int:
    return sum(elements for kind, elements in states.parameters.items() if (kind == "bank") == experts)


def _experts(model: ModelConfig, topology: TieTopology, layout: Layout, layers: range) -> Iterator[Flow]:
    uses = sum(topology.bank_of_layer[layer] is not None for layer in layers)
    routed = layout.tokens * model.moe_router_topk * uses * layout.accumulation
    passes = 3 if recomputes_experts(layout) else 2
    hidden = routed * model.hidden_size * layout.width * passes
    # Routing probabilities go along with the tokens.
    both = {"dispatch": hidden + routed * passes * layout.width, "combine": hidden}
    for name, payload in both.items():
        yield Flow(name, "all-to-all", "expert", layout.expert_parallel, 1, payload)


def recomputes_experts(layout: Layout) -> bool:
    """Whether backward sends tokens to the experts and through them once more."""
    return layout.recompute.method is not None or "moe" in layout.recompute.modules


def _tensor_parallel(model: ModelConfig, topology: TieTopology, layout: Layout, stage: range) -> Iterator[Flow]:
    shared = model.moe_shared_expert_intermediate_size is not None
    blocks = len(stage) + sum(topology.bank_of_layer[layer] is None or shared for layer in stage)
    again = 1 if layout.recompute.method is not None else 0
    whole = layout.tokens * layout.tensor_parallel * model.hidden_size * layout.width * layout.accumulation
    # In forward gathered before a block and scattered after it; in backward the reverse, and gathered once more for
    # the weight gradient.
    gathers, scatters = blocks * (3 + again), blocks * (2 + again)
    if stage.start == 0:
        gathers, scatters = gathers + 1, scatters + 1
    if stage.stop == model.num_layers:
        gathers, scatters = gathers + 2, scatters + 1
    ranks = layout.tensor_parallel
    yield Flow("sequence gather", "all-gather", "tensor", ranks, 1, gathers * whole)
    yield Flow("sequence scatter", "reduce-scatter", "tensor", ranks, 1, scatters * whole)


def _pipeline(model: ModelConfig, topology: TieTopology, layout: Layout, states: ModelStates) -> Iterator[Flow]:
    stride = layout.world_size // layout.pipeline_parallel
    payload = layout.tokens * model.hidden_size * layout.width * layout.accumulation
    yield Flow("pipeline", "send", "pipeline", layout.pipeline_parallel, stride, payload)
    stages = layout.stages(topology)
    for bank, elements in states.banks.items():
        # Every stage that uses a bank has a copy; their gradients are summed as those of tied embeddings are.
        holders = sum(any(layer in stage for layer in topology.banks[bank].layers) for stage in stages)
        yield Flow("bank copies", "all-reduce", "pipeline", holders, stride, elements * layout.width)


def busiest_stage(topology: TieTopology, layout: Layout) -> int:
    """The pipeline stage with most MoE layers, by which the others wait."""
    stages = layout.stages(topology)
    uses = [sum(topology.bank_of_layer[layer] is not None for layer in stage) for stage in stages]
    return max(range(len(stages)), key=lambda stage: (uses[stage], len(stages[stage])))
