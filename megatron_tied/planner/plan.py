"""One plan: what a run needs on the fullest rank, what it sends, how long a step takes, and whether it fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.models.config import ModelConfig
from megatron_tied.planner.compute import Flops, flops_per_token
from megatron_tied.planner.hardware import GB, Hardware
from megatron_tied.planner.layout import Layout, Recompute
from megatron_tied.planner.memory import MemoryPlan, memory_plan
from megatron_tied.planner.parameters import ParameterCount, count_parameters, known_vocabulary
from megatron_tied.planner.states import ModelStates, model_states
from megatron_tied.planner.timing import StepTime, assumptions, step_time
from megatron_tied.planner.traffic import Flow, busiest_stage, step_traffic
from megatron_tied.topology import TieConfig, TieTopology


class Subject:
    """A model on a machine, planned again and again: what does not depend on the whole layout is computed once.

    Raises ConfigError if neither `vocab_size` nor the model says how large the vocabulary is.
    """

    def __init__(self, model: ModelConfig, hardware: Hardware, vocab_size: int | None = None):
        self.model = model
        self.hardware = hardware
        self.vocab_size = known_vocabulary(model, vocab_size)
        self.topology = lru_cache(None)(model.topology)
        self.parameters = lru_cache(None)(self._parameters)
        self._states = lru_cache(None)(self._states_of_stages)
        self._flops = lru_cache(None)(self._flops_per_token)

    def _parameters(self, tie: TieConfig) -> ParameterCount:
        return count_parameters(self.model, self.topology(tie), self.vocab_size)

    def _flops_per_token(self, tie: TieConfig, seq_length: int) -> Flops:
        return flops_per_token(self.model, self.topology(tie), seq_length, self.vocab_size)

    def _states_of_stages(self, tie: TieConfig, layout: Layout) -> list[ModelStates]:
        topology = self.topology(tie)
        return [
            model_states(self.model, topology, layout, layers, self.vocab_size) for layers in layout.stages(topology)
        ]

    def plan(self, tie: TieConfig, layout: Layout) -> Plan:
        """The plan of `layout` with the model's layers tied by `tie`. Raises ConfigError if they do not go together."""
        topology, hardware = self.topology(tie), self.hardware
        if layout.precision not in hardware.tflops:
            raise ConfigError(Problem("--hardware", hardware.name, f"must say its tflops in {layout.precision}"))
        self.parameters(tie)
        layout.check(self.model, topology)
        if layout.expert_parallel > 1 and self.model.moe_token_dispatcher_type != "alltoall":
            valid = 'must be "alltoall" to be planned with expert parallelism'
            raise ConfigError(Problem("model.moe_token_dispatcher_type", self.model.moe_token_dispatcher_type, valid))
        states = self._states(tie, _what_states_depend_on(layout))
        memory = memory_plan(
            self.model,
            topology,
            layout,
            vocab_size=self.vocab_size,
            kernels=hardware.kernels,
            reserve=hardware.reserve,
            states=states,
        )
        flops = self._flops(tie, layout.seq_length)
        busiest = busiest_stage(topology, layout)
        flows = step_traffic(self.model, topology, layout, layout.stages(topology)[busiest], states[busiest])
        time = step_time(self.model, topology, layout, hardware, flops, states[busiest], flows)
        return Plan(topology, layout, hardware, self.parameters(tie), memory, tuple(flows), flops, time)


def _what_states_depend_on(layout: Layout) -> Layout:
    """A layout with the same states, alike for all micro-batches and ways to recompute: a key for the cache."""
    return replace(
        layout,
        seq_length=1,
        micro_batch_size=1,
        global_batch_size=layout.data_parallel * min(layout.accumulation, 2),
        recompute=Recompute(),
        imbalance=1.0,
    )


@dataclass(frozen=True)
class Plan:
    """Everything the planner knows about one run; bytes, seconds, and operations of the fullest or any rank."""

    topology: TieTopology
    layout: Layout
    hardware: Hardware
    parameters: ParameterCount
    memory: MemoryPlan
    traffic: Sequence[Flow]
    flops: Flops
    time: StepTime

    @property
    def fits(self) -> bool:
        """Whether the fullest rank's memory is enough."""
        return self.memory.total <= self.hardware.memory

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the whole job per second."""
        return self.layout.global_batch_size * self.layout.seq_length / self.time.total

    @property
    def utilisation(self) -> float:
        """Model FLOPs utilisation: useful operations over what the devices could do."""
        peak = self.hardware.tflops[self.layout.precision] * 1e12 * self.layout.world_size
        return self.flops.training * self.tokens_per_second / peak

    def wire(self, word: str) -> int:
        """Bytes that a rank sends in a step for purposes with `word` in their names."""
        return sum(flow.wire for flow in self.traffic if word in flow.purpose)

    def between_nodes(self) -> int:
        """Bytes of a step that leave the node, on behalf of one rank."""
        return sum(flow.between_nodes(self.hardware.ranks_per_node) for flow in self.traffic)

    def to_json(self) -> dict[str, Any]:
        """JSON types only; bytes, seconds, elements."""
        layout, memory = self.layout, self.memory
        per_node = self.hardware.ranks_per_node
        return {
            "topology": self.topology.describe(),
            "tie": self.topology.to_dict()["tie"],
            "layout": {
                "world_size": layout.world_size,
                "expert_parallel": layout.expert_parallel,
                "tensor_parallel": layout.tensor_parallel,
                "pipeline_parallel": layout.pipeline_parallel,
                "data_parallel": layout.data_parallel,
                "expert_data_parallel": layout.expert_data_parallel,
                "zero_stage": layout.zero_stage,
                "micro_batch_size": layout.micro_batch_size,
                "global_batch_size": layout.global_batch_size,
                "gradient_accumulation_steps": layout.accumulation,
                "seq_length": layout.seq_length,
                "precision": layout.precision,
                "recompute": str(layout.recompute),
                "optimizer": layout.optimizer,
                "offload_optimizer": layout.offload_optimizer,
                "offload_parameters": layout.offload_parameters,
            },
            "parameters": {
                "total": self.parameters.total,
                "untied": self.parameters.untied,
                "active": self.parameters.active,
                "routed_experts": self.parameters.routed_experts,
                "on_this_rank": dict(memory.states.parameters),
            },
            "memory": {
                **memory.parts,
                "total": memory.total,
                "host": memory.states.host,
                "pipeline_stage": memory.stage,
            },
            "available": self.hardware.memory,
            "fits": self.fits,
            "traffic": [
                {**flow._asdict(), "wire": flow.wire, "between_nodes": flow.between_nodes(per_node)}
                for flow in self.traffic
            ],
            "flops_per_token": {**self.flops._asdict(), "training": self.flops.training},
            "seconds": {**self.time.seconds, "total": self.time.total},
            "tokens_per_second": self.tokens_per_second,
            "model_flops_utilisation": self.utilisation,
            "assumptions": assumptions(self.hardware, layout),
        }


def gigabytes(size: float) -> str:
    """Bytes for people, in 10^9."""
    value = size / GB
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
