"""A benchmark for people: one table, contenders as rows, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_tied.bench.job import HUGGINGFACE, TIED, UNTIED
from megatron_tied.bench.results import Result, Row

_MB, _GB = 10**6, 10**9
# Of losses in bf16, relative.
_ROUNDING = 2e-3
_LARGEST_SHOWN, _LONGEST_NAME = 3, 60

_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("s/step", lambda row: f"{row['seconds_of_a_step']:.4g}"),
    ("tokens/s", lambda row: f"{row['tokens_per_second']:,.0f}"),
    ("forward", lambda row: f"{row['phases']['forward']:.3g}"),
    ("backward", lambda row: f"{row['phases']['backward']:.3g}"),
    # After backward; what runs inside of it, as that of peers does, is backward's.
    ("reduce", lambda row: f"{row['phases']['reduce']:.3g}" if row["phases"]["reduce"] else "-"),
    ("optimizer", lambda row: f"{row['phases']['optimizer']:.3g}"),
    ("states MB", lambda row: f"{row['states']['total'] / _MB:,.1f}"),
    ("peak MB", lambda row: "-" if row["peak_memory"] is None else f"{row['peak_memory'] / _MB:,.0f}"),
    ("expert grads MB", lambda row: f"{row['reduction_bytes']['experts'] / _MB:,.2f}"),
    ("of tied layers", lambda row: f"{row['reduction_bytes']['tied_layers'] / _MB:,.2f}"),
    ("other grads MB", lambda row: f"{row['reduction_bytes']['rest'] / _MB:,.2f}"),
    ("GEMM time", lambda row: f"{row['kernels']['shares']['GEMM']:.0%}"),
    ("of GEMM ceiling", lambda row: f"{row['share_of_gemm_ceiling']:.0%}"),
)


def report(result: Result) -> RenderableType:
    """What `measurement.measure` found."""
    table = Table("", box=None, pad_edge=False, header_style="bold")
    for name, _ in _COLUMNS:
        table.add_column(name, justify="right")
    for name, row in result["contenders"].items():
        table.add_row(name, *(cell(row) for _, cell in _COLUMNS))
    lines = [*_conclusions(result), "", *_kernels(result), "", *_conditions(result)]
    return Group(Text(_subject(result)), Text(), table, Text(), Text("\n".join(lines)))


def _subject(result: Result) -> str:
    train, parallel = result["config"]["train"], result["config"]["parallel"]
    model = result["config"]["model"]
    named = " ".join(filter(None, (model.get("preset"), model.get("scale")))) or "model"
    stage = result["config"]["deepspeed"].get("zero_optimization", {}).get("stage", 1)
    return (
        f"{named}, {result['topology']}; {train['global_batch_size']:,} x {train['seq_length']:,} tokens a step, "
        f"micro-batch {train['micro_batch_size']}, {train['precision']}; ranks {result['ranks']}, expert parallel "
        f"{parallel['expert_model_parallel_size']}, ZeRO {stage}"
    )


def _conclusions(result: Result) -> Iterator[str]:
    turns = f"{result['rounds']} rounds of {result['steps_of_a_turn']} steps"
    for name, comparison in result["comparisons"].items():
        yield f"speed of tied over {name}, {turns}: {comparison['told']}"
    yield from different_models(result["contenders"])
    for name, reason in result["left_out"].items():
        yield f"{name} was left out: {reason}"
    contenders = result["contenders"]
    if UNTIED in contenders:
        ours, theirs = (contenders[name] for name in (TIED, UNTIED))
        yield _reduction_line(*(row["reduction_bytes"]["tied_layers"] for row in (ours, theirs)))
        if ours["bank_gathers"] is not None:
            gathers = [f"{row['bank_gathers']:.3g}" for row in (ours, theirs)]
            yield f"ZeRO 3 gathers per micro-batch of a tie group's experts: tied {gathers[0]}, untied {gathers[1]}"


def different_models(contenders: Mapping[str, Row]) -> Iterator[str]:
    """Warnings of peers whose first loss is another than that of our model, with whose weights they began."""
    for name, row in contenders.items():
        ours = contenders.get(TIED if name == HUGGINGFACE else UNTIED)
        if ours is None or name in (TIED, UNTIED):
            continue
        first, expected = row["first_loss"], ours["first_loss"]
        if abs(first - expected) > _ROUNDING * abs(expected):
            yield f"WARNING: the first loss of {name} is {first:.4f} for {expected:.4f}: it computes another model"


def _reduction_line(tied: int, untied: int) -> str:
    if untied == 0:
        return "gradient reduction of experts: none, each rank is the only one with its experts"
    return (
        f"gradient reduction of the tied layers' experts, bytes a step and rank: tied {tied:,}, untied {untied:,}"
        f" ({untied / tied:.6g} times as many)"
    )


def _kernels(result: Result) -> Iterator[str]:
    of = "kernel time" if result["device"] == "cuda" else "operators' own time"
    for name, row in result["contenders"].items():
        shares = sorted(row["kernels"]["shares"].items(), key=lambda item: -item[1])
        told = ", ".join(f"{kind} {share:.0%}" for kind, share in shares if share >= 0.005)
        largest = ", ".join(
            f"{operator['name'][:_LONGEST_NAME]} {operator['share']:.0%}"
            for operator in row["kernels"]["largest"][:_LARGEST_SHOWN]
        )
        yield f"{of} of {name}: {told}; largest: {largest}"


def _conditions(result: Result) -> Iterator[str]:
    ceilings, machine = result["ceilings"], result["hardware"]
    yield (
        f"ceilings of a rank, measured: {ceilings['gemm_flops_per_second'] / _GB:,.1f} GFLOP/s in a matrix product, "
        f"{ceilings['copy_bytes_per_second'] / _GB:,.1f} GB/s in a copy"
    )
    shares = {name: row["share_of_copy_bandwidth_in_optimizer"] for name, row in result["contenders"].items()}
    if told := [f"{name} {share:.0%}" for name, share in shares.items() if share is not None]:
        yield f"optimizer phase, share of the copy bandwidth: {', '.join(told)}"
    where = ", ".join(machine["gpus"]) or f"{machine['processor']}, {machine['cores']} cores"
    yield f"{where}; {result['threads']} threads a rank; a MB is 10^6 bytes; memory and reductions are of one rank"
    yield ", ".join(f"{package} {version}" for package, version in result["software"].items())
