"""How a run is laid out over ranks: what the planner needs to know beside the model and its tie groups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.models.config import ModelConfig, indivisible
from megatron_tied.planner.pipeline import aligned_cut, straddling
from megatron_tied.planner.tensors import Kind
from megatron_tied.topology import TieTopology

Precision = Literal["fp32", "bf16", "fp16"]

# Bytes of a number in which weights, gradients and activations are kept.
WIDTH: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}

RECOMPUTE_MODULES = frozenset({"core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts"})


@dataclass(frozen=True)
class Recompute:
    """What is computed again in backward, in Megatron-Core's words.

    modules: of `recompute_granularity: selective`. method, num_layers: of `full`; method None: not full.
    """

    modules: frozenset[str] = frozenset()
    method: Literal["uniform", "block"] | None = None
    num_layers: int = 1

    @classmethod
    def of(cls, model: ModelConfig) -> Recompute:
        """What `model` says, with Megatron-Core's defaults. Raises ConfigError for what Megatron-Core does not know."""
        extra = model.model_extra or {}
        match extra.get("recompute_granularity"):
            case "full":
                method = extra.get("recompute_method")
                if method not in ("uniform", "block"):
                    valid = 'must be "uniform" or "block" with model.recompute_granularity = full'
                    raise ConfigError(Problem("model.recompute_method", method, valid))
                return cls(method=method, num_layers=extra.get("recompute_num_layers") or 1)
            case "selective":
                modules = frozenset(extra.get("recompute_modules") or ("core_attn",))
                if unknown := sorted(modules - RECOMPUTE_MODULES):
                    valid = f"must be among {', '.join(sorted(RECOMPUTE_MODULES))}"
                    raise ConfigError(Problem("model.recompute_modules", unknown, valid))
                return cls(modules)
            case _:
                return cls()

    def segment(self, layer: int, num_layers: int) -> range:
        """The layers that are computed again together with `layer`; empty if it is not among such."""
        if self.method == "block":
            return range(layer, layer + 1) if layer < self.num_layers else range(0)
        if self.method == "uniform":
            first = layer - layer % self.num_layers
            return range(first, min(first + self.num_layers, num_layers))
        return range(0)

    def __str__(self) -> str:
        if self.method is None:
            return "+".join(sorted(self.modules)) or "none"
        return "full" if (self.method, self.num_layers) == ("uniform", 1) else f"full ({self.method} {self.num_layers})"


@dataclass(frozen=True)
class Layout:
    """Ranks, batch, precision and ZeRO of a run. Batch sizes in sequences, bucket sizes in elements.

    Expert parallel groups are runs of neighbouring ranks, tensor parallel groups too; experts are whole on every
    tensor parallel rank. frozen: kinds of parameters that are not trained. overlap_comm None: DeepSpeed's default.
    imbalance: tokens of the busiest expert parallel rank over the mean.
    """

    world_size: int
    seq_length: int
    micro_batch_size: int = 1
    global_batch_size: int = 1
    expert_parallel: int = 1
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    precision: Precision = "bf16"
    zero_stage: int = 1
    recompute: Recompute = Recompute()
    optimizer: Literal["adamw", "muon"] = "adamw"
    frozen: frozenset[Kind] = frozenset()
    offload_optimizer: bool = False
    offload_parameters: bool = False
    overlap_comm: bool | None = None
    reduce_bucket_size: int = 500_000_000
    prefetch_bucket_size: int = 50_000_000
    persistence_threshold: int = 100_000
    max_live_parameters: int = 1_000_000_000
    # None: what the engine sets for tied models, DeepSpeed's default for others.
    max_reuse_distance: int | None = None
    sub_group_size: int = 1_000_000_000
    imbalance: float = 1.25

    @property
    def data_parallel(self) -> int:
        """Ranks that hold the same dense weights, or partitions of them."""
        return self.world_size // (self.tensor_parallel * self.pipeline_parallel)

    @property
    def expert_data_parallel(self) -> int:
        """Ranks that hold the same experts, or partitions of them."""
        return self.world_size // (self.expert_parallel * self.pipeline_parallel)

    @property
    def accumulation(self) -> int:
        """Micro-batches per rank and optimizer step."""
        return max(1, self.global_batch_size // (self.micro_batch_size * self.data_parallel))

    @property
    def width(self) -> int:
        """Bytes of a weight, a gradient, an activation."""
        return WIDTH[self.precision]

    @property
    def overlaps(self) -> bool:
        """Whether gradients are reduced while backward goes on."""
        return self.zero_stage == 3 if self.overlap_comm is None else self.overlap_comm

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one rank, whose sequences tensor parallel ranks divide."""
        return self.micro_batch_size * self.seq_length // self.tensor_parallel

    def problems(self, model: ModelConfig, topology: TieTopology) -> Iterator[Problem]:
        """What cannot be laid out so, under the names of the run config."""
        experts = {"model.num_moe_experts": model.num_moe_experts}
        if topology.tie.num_tied_experts:
            experts["tie.num_tied_experts"] = topology.tie.num_tied_experts
        ranks = {"the number of processes of a pipeline stage": self.world_size // self.pipeline_parallel}
        processes = {"the number of processes": self.world_size}
        yield from indivisible("parallel.pipeline_model_parallel_size", self.pipeline_parallel, processes)
        yield from indivisible("parallel.expert_model_parallel_size", self.expert_parallel, experts | ranks)
        cut = model.cut_by_tensor_parallelism() | {"train.seq_length": self.seq_length} | ranks
        yield from indivisible("parallel.tensor_model_parallel_size", self.tensor_parallel, cut)
        if self.pipeline_parallel > model.num_layers:
            valid = f"must be at most model.num_layers = {model.num_layers}"
            yield Problem("parallel.pipeline_model_parallel_size", self.pipeline_parallel, valid)
        elif topology.tie.pipeline == "align" and aligned_cut(topology, self.pipeline_parallel) is None:
            valid = f"no {self.pipeline_parallel} pipeline stages leave the tie groups whole: take fewer, or allreduce"
            yield Problem("tie.pipeline", "align", valid)
        if self.pipeline_parallel > 1 and self.zero_stage > 1:
            valid = "must be 0 or 1 with pipeline parallelism: gradients are summed over its micro-batches"
            yield Problem("deepspeed.zero_optimization.stage", self.zero_stage, valid)
        if self.pipeline_parallel > 1 and topology.shares_more:
            valid = "must be experts with pipeline parallelism: nothing else is shared there"
            yield Problem("tie.share", topology.tie.share, valid)
        least = 3 if self.offload_parameters else 1 if self.offload_optimizer else 0
        if self.zero_stage < least:
            valid = f"must be at least {least}: DeepSpeed offloads nothing below"
            yield Problem("deepspeed.zero_optimization.stage", self.zero_stage, valid)
        unit = self.micro_batch_size * max(1, self.data_parallel)
        if self.global_batch_size % unit:
            valid = f"must be a multiple of {unit} = micro-batch x data parallel ranks"
            yield Problem("train.global_batch_size", self.global_batch_size, valid)

    def check(self, model: ModelConfig, topology: TieTopology) -> None:
        """Raise ConfigError for everything in `problems`."""
        if problems := list(self.problems(model, topology)):
            raise ConfigError(problems)

    def stages(self, topology: TieTopology) -> list[range]:
        """The layers of each pipeline stage: even, the first stages longer where they do not divide.

        With `tie.pipeline: align`, cut between tie groups; it must be possible (`problems`).
        """
        base, rest = divmod(topology.num_layers, self.pipeline_parallel)
        sizes = tuple(base + (stage < rest) for stage in range(self.pipeline_parallel))
        if topology.tie.pipeline == "align" and straddling(topology, sizes):
            sizes = aligned_cut(topology, self.pipeline_parallel) or sizes
        return [range(sum(sizes[:stage]), sum(sizes[: stage + 1])) for stage in range(self.pipeline_parallel)]
