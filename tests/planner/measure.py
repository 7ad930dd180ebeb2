"""One rank that trains a small model and measures what the planner foretells: states, peak memory, traffic."""

from __future__ import annotations

import gc
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker, get_moe_layer_wise_logging_tracker
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import megatron_tied as mt
from megatron_tied.engine.muon import MuonAdamW
from megatron_tied.engine.parameter_groups import AdamWGroups
from megatron_tied.engine.partitions import state_bytes
from megatron_tied.planner.activations import UNFUSED
from megatron_tied.planner.layout import Layout, Recompute
from megatron_tied.planner.memory import memory_plan
from megatron_tied.planner.traffic import step_traffic
from tests.distributed.training_run import RECOMPUTE, micro_batch, model_parallel

# So few that the embedding, of which ZeRO 2 and 3 have a gradient or a copy under way, is nothing beside the states.
VOCABULARY = 32
MODEL: dict[str, Any] = {
    "num_layers": 6,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "num_moe_experts": 8,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 192,
    "vocab_size": VOCABULARY,
    "qk_layernorm": True,
    "moe_aux_loss_coeff": 0.01,
}
# So small that it is nothing beside the states, and every gradient comes by itself.
BUCKET = 1000


@dataclass(frozen=True)
class Case:
    """What is trained, and how; `model` changes fields of MODEL."""

    ep: int = 1
    tp: int = 1
    stage: int = 1
    group_size: int = 1
    share: str = "experts"
    tied_experts: int | None = None
    precision: str = "fp32"
    micro_batch: int = 1
    seq_length: int = 16
    accumulation: int = 1
    recompute: str = "none"
    optimizer: str = "adamw"
    model: dict[str, Any] = field(default_factory=dict)
    # Whether the peak is measured too, which takes a profiler.
    peak: bool = False


def measure(case: Case) -> dict[str, Any]:
    """Planned and measured figures of one case on this rank; a collective."""
    if tracker := get_moe_layer_wise_logging_tracker():
        # It is as long as the model was for which it was made.
        clear_aux_losses_tracker()
        tracker.clear()
    with model_parallel(case.ep, case.tp):
        gc.collect()
        before = _storages()
        model = mt.ModelConfig.resolve({**MODEL, **RECOMPUTE[case.recompute], **case.model})
        engine = _engine(case, model)
        batches = _batches(case)
        # ZeRO 3 fetches as it has seen in an earlier step.
        for _ in range(2 if case.stage == 3 else 1):
            _step(engine, case, batches)
        step = partial(_step, engine, case, batches)
        states: list[int] = []
        with _at_reduction(lambda: states.append(_bytes_now(before))), _CountTraffic() as traffic:
            _step(engine, case, batches)
        result = {
            "case": asdict(case),
            "states": _most_over_ranks(_states(case, states)),
            "reported states": state_bytes(engine),
            # The least of some steps: gloo's threads hold what they have reduced for longer or shorter.
            "peak": _most_over_ranks(min(_peak(before, step) for _ in range(3))) if case.peak else None,
            "traffic": _mean_over_ranks(traffic.sent),
            **_planned(case, model),
        }
        engine.destroy()
    return result


def _states(case: Case, seen: list[int]) -> int:
    """Of what was seen before and after each reduction: the most that the model's states were.

    Before it there are whole gradients (stages 0 and 1), or those accumulated beside the last micro-batch's. Where only
    partitions are kept a bucket may be there before, so that the least counts.
    """
    before = seen[::2]
    return max(before) if case.stage < 2 or case.accumulation > 1 else min(seen)


def _planned(case: Case, model: mt.ModelConfig) -> dict[str, Any]:
    world = torch.distributed.get_world_size()
    layout = Layout(
        world_size=world,
        seq_length=case.seq_length,
        micro_batch_size=case.micro_batch,
        global_batch_size=case.micro_batch * case.accumulation * world // case.tp,
        expert_parallel=case.ep,
        tensor_parallel=case.tp,
        precision=case.precision,
        zero_stage=case.stage,
        optimizer=case.optimizer,
        recompute=Recompute.of(model),
        overlap_comm=False,
        reduce_bucket_size=BUCKET,
        prefetch_bucket_size=0,
        persistence_threshold=0,
        imbalance=1.0,
    )
    topology = model.topology(_tie(case))
    memory = memory_plan(model, topology, layout, vocab_size=model.vocab_size, kernels=UNFUSED)
    traffic: Counter[str] = Counter()
    for flow in step_traffic(model, topology, layout, range(model.num_layers), memory.states):
        traffic[f"{flow.collective} {flow.ranks}"] += flow.payload
    return {
        "planned states": memory.states.device,
        "planned peak": memory.tensors,
        "planned traffic": dict(traffic),
        "parts": dict(memory.parts),
    }


def _tie(case: Case) -> mt.TieConfig:
    tied = {"share": case.share, "num_tied_experts": case.tied_experts}
    return mt.TieConfig(group_size=case.group_size, skip_first=1, skip_last=1, **tied)


def _engine(case: Case, model: mt.ModelConfig) -> Any:
    built = mt.build_gpt_model(model, _tie(case), precision=case.precision)
    config = {
        "train_micro_batch_size_per_gpu": case.micro_batch,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": case.stage,
            "overlap_comm": False,
            "reduce_bucket_size": BUCKET,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 0,
        },
        "bf16": {"enabled": case.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    return mt.initialize(built, config, optimizer=_optimizer(case, built))[0]


def _optimizer(case: Case, model: torch.nn.Module) -> torch.optim.Optimizer:
    if case.optimizer == "adamw":
        return torch.optim.AdamW(mt.parameter_groups(model, lr=1e-3, weight_decay=0.1), lr=1e-3)
    groups = mt.parameter_groups(model, lr=1e-3, weight_decay=0.1, beside_muon=AdamWGroups(1e-4, 0.01))
    return MuonAdamW(groups, partial(torch.optim.AdamW, lr=1e-4), lr=1e-3)


def _batches(case: Case) -> list[Any]:
    rows = torch.randint(VOCABULARY, (case.micro_batch, case.seq_length + 1))
    return [micro_batch(rows, 0, 1)] * case.accumulation


def _step(engine: Any, case: Case, batches: list[Any]) -> None:
    for tokens, positions, mask, labels in batches:
        engine.backward(engine(tokens, positions, mask, labels=labels).float().mean())
        engine.step()


def _storages() -> dict[int, torch.UntypedStorage]:
    """Every storage of a tensor that Python knows, gradients included, by address; held, so that none is used again."""
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.device.type == "cpu":
                    storage = tensor.untyped_storage()
                    found[storage._cdata] = storage
    return found


def _bytes_now(before: Any) -> int:
    gc.collect()
    return sum(storage.nbytes() for key, storage in _storages().items() if key not in before)


@contextmanager
def _at_reduction(look: Callable[[], None]) -> Iterator[None]:
    """Calls `look` before and after gradients are reduced, when the last backward has ended."""
    original = DeepSpeedEngine.allreduce_gradients

    def looked(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A collective that is over lets go of its tensors in threads of its own: not before all ranks are here.
        torch.distributed.barrier()
        look()
        result = original(self, *args, **kwargs)
        torch.distributed.barrier()
        look()
        return result

    DeepSpeedEngine.allreduce_gradients = looked
    try:
        yield
    finally:
        DeepSpeedEngine.allreduce_gradients = original


def _peak(before: Any, step: Callable[[], None]) -> int:
    """The highest sum of all memory that the CPU allocator had given out during `step`."""
    at_begin = _bytes_now(before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    given = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = highest = 0
    for _, size in given:
        now += size
        highest = max(highest, now)
    return at_begin + highest


_NAMES = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "alltoall_base_": "all-to-all",
}


class _CountTraffic(TorchDispatchMode):
    """Counts what is handed to collectives: the whole tensor; for an all-to-all what this rank sends."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            group = next(filter(None, map(_process_group, args)))
            sizes = [_bytes(argument) for argument in args[:2]]
            if group.size() > 1:
                name = _NAMES.get(func._opname, func._opname)
                size = sizes[1] if name == "all-to-all" else max(sizes)
                self.sent[f"{name} {group.size()}"] += size
        return func(*args, **(kwargs or {}))


def _process_group(argument: Any) -> torch.distributed.ProcessGroup | None:
    if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
        return torch.distributed.ProcessGroup.unbox(argument)
    return None


def _bytes(argument: Any) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.nbytes
    return sum(map(_bytes, argument)) if isinstance(argument, (list, tuple)) else 0


def _most_over_ranks(size: int) -> int:
    most = torch.tensor(size)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return int(most)


def _mean_over_ranks(sent: Counter[str]) -> dict[str, float]:
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, dict(sent))
    return {key: sum(of_rank.get(key, 0) for of_rank in everywhere) / len(everywhere) for key in everywhere[0]}


def main(cases_file: str, result_file: str) -> None:
    """Measures the cases of a JSON file; rank 0 writes what came out."""
    torch.manual_seed(1)
    # What the imports have made is never looked at again: collecting garbage takes a tenth of the time.
    gc.collect()
    gc.freeze()
    results = [measure(Case(**case)) for case in json.loads(Path(cases_file).read_text())]
    if torch.distributed.get_rank() == 0:
        Path(result_file).write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
