"""What tying saves, by the planner's formulas for parameters and Megatron-LM's for bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_tied.patching.arguments import Arguments
from megatron_tied.patching.megatron_arguments import DerivedModel, count_of
from megatron_tied.patching.pipeline import pipeline_cut
from megatron_tied.planner.pipeline import aligned_cut, straddling
from megatron_tied.planner.plan import gigabytes
from megatron_tied.planner.sharding import local_elements, stage_tensors
from megatron_tied.planner.tensors import Tensor, model_tensors
from megatron_tied.topology import TieConfig, TieTopology

_FP32 = 4
_ENDS = ("embedding", "output")


@dataclass(frozen=True)
class Amount:
    """Parameters of the whole model, and bytes of the fullest rank; traffic is what a rank sends in a step."""

    experts: int
    total: int
    rank_bytes: int
    traffic: int


@dataclass(frozen=True)
class Savings:
    """An untied model and the tied one, in one layout."""

    derived: DerivedModel
    topology: TieTopology
    untied: Amount
    tied: Amount

    def lines(self) -> Iterator[str]:
        """For people."""
        derived, layout = self.derived, self.derived.layout
        model = derived.model
        yield (
            f"model: {model.num_layers} layers, {model.num_moe_experts} experts, top {model.moe_router_topk}, "
            f"hidden size {model.hidden_size}; {self.topology.describe()}"
        )
        yield _ranks(derived)
        yield f"{'':36}{'untied':>16}{'tied':>16}"
        embeddings = "" if derived.vocab_size else ", no embeddings"
        yield _row("expert parameters", f"{self.untied.experts:,}", f"{self.tied.experts:,}")
        yield _row(f"all parameters{embeddings}", f"{self.untied.total:,}", f"{self.tied.total:,}")
        yield _row("states of the fullest rank, GB", gigabytes(self.untied.rank_bytes), gigabytes(self.tied.rank_bytes))
        if layout.world_size // self._copies() > 1:
            yield _row("expert gradients sent a step, GB", gigabytes(self.untied.traffic), gigabytes(self.tied.traffic))
        else:
            yield "expert gradients are not sent: no two ranks hold the same experts"
        yield "states: weights, gradients, and what the optimizer keeps; activations are not among them"
        yield from (f"assumed: {line}" for line in derived.assumed)
        if not derived.vocab_size:
            yield "left out: embeddings, whose size --vocab-size does not say here"
        yield from (f"left out: {name}, whose parameters are not counted" for name in derived.left_out)

    def _copies(self) -> int:
        layout = self.derived.layout
        return layout.expert_parallel * layout.pipeline_parallel * self.derived.expert_tensor_parallel


def savings(derived: DerivedModel, tie: TieConfig, arguments: Arguments) -> Savings:
    """Both models counted. Raises ConfigError if the tie groups do not fit the layers."""
    topology = derived.model.topology(tie)
    untied = derived.model.topology(tie.untied())
    return Savings(
        derived,
        topology,
        _amount(derived, untied, arguments),
        _amount(derived, topology, arguments),
    )


def _amount(derived: DerivedModel, topology: TieTopology, arguments: Arguments) -> Amount:
    model, vocabulary = derived.model, derived.vocab_size or 1
    whole = [tensor for tensor in model_tensors(model, topology, vocabulary) if _counts(tensor, derived)]
    of_ranks = [_on_rank(stage, derived) for stage in _stages(derived, topology, arguments)]
    experts = max(elements for elements, _ in of_ranks)
    width = _gradient_width(derived, arguments)
    rank_bytes = max(_state_bytes(*elements, derived, width) for elements in of_ranks)
    return Amount(
        experts=sum(tensor.numel * tensor.copies for tensor in whole if tensor.bank is not None),
        total=sum(tensor.numel * tensor.copies for tensor in whole),
        rank_bytes=rank_bytes,
        traffic=_gradient_traffic(experts, derived, width),
    )


def _counts(tensor: Tensor, derived: DerivedModel) -> bool:
    return derived.vocab_size is not None or tensor.kind not in _ENDS


def _stages(derived: DerivedModel, topology: TieTopology, arguments: Arguments) -> Iterator[list[Tensor]]:
    """The tensors of each pipeline stage: those of all its chunks, a bank's once."""
    model, vocabulary, count = derived.model, derived.vocab_size or 1, derived.layout.pipeline_parallel
    chunks = _chunks(derived, topology, arguments)
    for stage in range(count):
        tensors: list[Tensor] = []
        seen: set[int] = set()
        for layers in chunks[stage::count]:
            found = [tensor for tensor in stage_tensors(model, topology, layers, vocabulary) if tensor.bank not in seen]
            seen |= {tensor.bank for tensor in found if tensor.bank is not None}
            tensors += [tensor for tensor in found if _counts(tensor, derived)]
        yield tensors


def _chunks(derived: DerivedModel, topology: TieTopology, arguments: Arguments) -> Sequence[range]:
    layers, layout = derived.model.num_layers, derived.layout
    cut = pipeline_cut(arguments, layers)
    if cut is None:
        return layout.stages(topology)
    if topology.tie.pipeline == "align" and straddling(topology, cut):
        cut = aligned_cut(topology, len(cut)) or cut
    return [range(sum(cut[:chunk]), sum(cut[: chunk + 1])) for chunk in range(len(cut))]


def _on_rank(tensors: Sequence[Tensor], derived: DerivedModel) -> tuple[int, int]:
    """Elements of routed experts and of all else on one rank of a stage."""
    # The planner keeps experts whole on every tensor parallel rank: what Megatron-LM cuts is cut here.
    experts = sum(local_elements(tensor, derived.layout) for tensor in tensors if tensor.bank is not None)
    others = sum(local_elements(tensor, derived.layout) for tensor in tensors if tensor.bank is None)
    return experts // derived.expert_tensor_parallel, others


def _gradient_width(derived: DerivedModel, arguments: Arguments) -> int:
    """Bytes of a gradient in Megatron-LM's buffers, where it is also sent from."""
    match derived.layout.precision:
        case "bf16":
            return 2 if "--grad-reduce-in-bf16" in arguments else _FP32
        case "fp16":
            return _FP32 if "--accumulate-allreduce-grads-in-fp32" in arguments else 2
        case _:
            return _FP32


def _state_bytes(experts: int, others: int, derived: DerivedModel, gradient_width: int) -> int:
    """Weights, gradients, and the optimizer's fp32 weights and two moments, which data parallel ranks divide."""
    layout = derived.layout
    mixed = layout.precision != "fp32"
    kept = layout.width + gradient_width
    optimizer = (3 if mixed else 2) * _FP32
    expert_ranks = _expert_data_parallel(derived) if layout.zero_stage else 1
    dense_ranks = layout.data_parallel if layout.zero_stage else 1
    return experts * kept + others * kept + experts * optimizer // expert_ranks + others * optimizer // dense_ranks


def _expert_data_parallel(derived: DerivedModel) -> int:
    return max(1, derived.layout.expert_data_parallel // derived.expert_tensor_parallel)


def _gradient_traffic(experts: int, derived: DerivedModel, width: int) -> int:
    ranks = _expert_data_parallel(derived)
    rounds = 1 if derived.layout.zero_stage else 2
    return experts * width * rounds * (ranks - 1) // ranks


def _ranks(derived: DerivedModel) -> str:
    layout = derived.layout
    sizes = [
        ("expert", layout.expert_parallel),
        ("expert tensor", derived.expert_tensor_parallel),
        ("tensor", layout.tensor_parallel),
        ("pipeline", layout.pipeline_parallel),
        ("context", derived.context_parallel),
    ]
    parallel = ", ".join(f"{name} parallel {size}" for name, size in sizes if size > 1) or "data parallel"
    sharded = "distributed optimizer" if layout.zero_stage else "optimizer on every rank"
    return f"layout: {count_of(layout.world_size, 'rank')}, {parallel}; {sharded}, {layout.precision}"


def _row(name: str, untied: str, tied: str) -> str:
    return f"  {name:<34}{untied:>16}{tied:>16}"
