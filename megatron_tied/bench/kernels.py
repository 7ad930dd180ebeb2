"""Where the time of a step goes by kind of operation, from torch's profiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from megatron_tied.bench.results import Kernels, Operator, Shares

GEMM, ATTENTION, ELEMENT_WISE, COPY = "GEMM", "attention", "element-wise", "copies and permutes"
COLLECTIVE, OTHER = "collectives", "other"
KINDS = (GEMM, ATTENTION, ELEMENT_WISE, COPY, COLLECTIVE, OTHER)

# Parts of names, in the order in which they decide; operators of torch on a CPU, kernels on a GPU.
_PARTS: Mapping[str, str] = {
    COLLECTIVE: "nccl gloo c10d:: alltoall record_param_comms distributeddataparallel",
    ATTENTION: "flash fmha attention",
    GEMM: "gemm grouped_mm addmm bmm nvjet cutlass xmma ::linear mkldnn",
    COPY: """copy memcpy memset index gather scatter permute sort topk cat embedding clone contiguous masked_select
        nonzero flip repeat one_hot histc bincount zero_ fill where take stack ::pad ::to radix""",
    ELEMENT_WISE: """elementwise reduce softmax norm rms silu sigmoid multi_tensor foreach triton adam dropout hardtanh
        exp log sqrt lerp addc clamp sum mean max neg rsub""",
}
_NAMES: Mapping[str, str] = {
    GEMM: "aten::mm aten::matmul aten::dot aten::mv",
    ELEMENT_WISE: """aten::add aten::sub aten::mul aten::div aten::pow aten::abs aten::sin aten::cos aten::gt aten::lt
        aten::ge aten::le aten::eq aten::ne aten::bitwise_not""",
}
_LARGEST = 10


def kind_of(name: str) -> str:
    """The kind, one of `KINDS`, of an operator or kernel."""
    if name.startswith("autograd::"):
        return OTHER  # what it calls has names of its own
    plain = name.lower().removesuffix("_")  # operators in place end so
    for kind, names in _NAMES.items():
        if plain in names.split():
            return kind
    return next((kind for kind, parts in _PARTS.items() if any(part in name.lower() for part in parts.split())), OTHER)


def kernel_shares(step: Callable[[], object]) -> Kernels:
    """Profile one call of `step`: `shares` of the time by kind, and the `largest` operators with theirs.

    Times are those of kernels where there is a GPU, else of operators without what they call; waiting for a GPU is not
    in them.
    """
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        step()
    # Not `key_averages`, which makes an object of each of so many events, in ten times the time.
    events = profiler.profiler.kineto_results.events()
    times: Counter[str] = Counter()
    if on_gpu:
        for event in events:
            # An annotation lies over kernels that are there themselves.
            if event.device_type() == DeviceType.CUDA and not event.is_user_annotation():
                times[event.name()] += event.duration_ns()
    else:
        of_threads: dict[int, list[Interval]] = {}
        for event in events:
            # Gloo's last from the call to the end of the transfer, whatever the thread does meanwhile; waiting is its
            # caller's time.
            if event.name().startswith("gloo:"):
                continue
            interval = Interval(event.start_ns(), event.end_ns(), event.name())
            of_threads.setdefault(event.start_thread_id(), []).append(interval)
        for intervals in of_threads.values():
            times += own_times(intervals)
    return {**shares(times), "seconds": sum(times.values()) / 1e9}


class Interval(NamedTuple):
    """When an operator ran, on one thread."""

    start: int
    end: int
    name: str


def own_times(intervals: Sequence[Interval]) -> Counter[str]:
    """The time of each operator without that of those inside of it; of one thread."""
    times: Counter[str] = Counter()
    around: list[Interval] = []
    for interval in sorted(intervals, key=lambda one: (one.start, -one.end)):
        while around and around[-1].end <= interval.start:
            around.pop()
        if around:
            times[around[-1].name] -= min(interval.end, around[-1].end) - interval.start
        times[interval.name] += interval.end - interval.start
        around.append(interval)
    return times


def shares(times: Counter[str]) -> Shares:
    """From the time of each operator, in any unit, its `shares` by kind and the `largest`."""
    total = sum(times.values()) or 1
    of_kind = dict.fromkeys(KINDS, 0.0)
    for name, time in times.items():
        of_kind[kind_of(name)] += time / total
    largest: list[Operator] = [
        {"name": name, "kind": kind_of(name), "share": time / total} for name, time in times.most_common(_LARGEST)
    ]
    return {"shares": of_kind, "largest": largest}
