"""What stands against tied experts in a file's arguments: told, and left to the user to change."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_tied.errors import Problem
from megatron_tied.megatron_lm.arguments import flag
from megatron_tied.megatron_lm.refused import REFUSED, graph_refusal, refusal, width_misfits
from megatron_tied.patching.arguments import Arguments
from megatron_tied.patching.pipeline import laid_out_by, parted_groups
from megatron_tied.topology import TieConfig, TieTopology

# Layers by a pattern of their own, where tie groups are counted over `--moe-layer-freq`.
HYBRID = ("--hybrid-layer-pattern", "--hybrid-override-pattern", "--is-hybrid-model")
# Megatron-LM itself translates them into `--cuda-graph-impl`.
_GRAPHS = ("--external-cuda-graph", "--enable-cuda-graph")
_ZERO = ("--zero-stage", "--deepspeed", "--deepspeed-config")
_FP8 = ("--fp8-format", "--fp8")
_DEFAULT_TOPK = 2  # of Megatron-LM
_EDGES = (("--num-layers-at-start-in-bf16", 1), ("--num-layers-at-end-in-bf16", 1))


def conflicts(arguments: Arguments, tie: TieConfig, topology: TieTopology | None) -> Iterator[Problem]:
    """Everything to warn about; what depends on the layers only if they are known."""
    for argument in REFUSED:
        if (name := flag(argument)) in arguments:
            yield refusal(argument, _said(arguments, name))
    for name in _GRAPHS:
        if name in arguments:
            valid = "cannot be used with tied experts: it captures a layer without its bank's weights; take it out"
            yield Problem(name, _said(arguments, name), valid)
    graphs = arguments.text("--cuda-graph-impl")
    if graphs not in (None, "none"):
        yield graph_refusal(graphs)
    yield from _width(arguments, tie.num_tied_experts)
    yield from _recompute_under_zero(arguments)
    yield from _capacity(arguments)
    yield from _dense_prefix(arguments)
    if topology is not None:
        yield from _pipeline(arguments, topology)
        yield from _edge_layers(arguments, topology)


def _width(arguments: Arguments, experts: int | None) -> Iterator[Problem]:
    if experts is None:
        return
    topk = "--moe-router-topk"
    yield from width_misfits(
        experts,
        expert_parallel=arguments.number("--expert-model-parallel-size"),
        router_groups=arguments.number("--moe-router-num-groups"),
        topk=arguments.number(topk) if topk in arguments else _DEFAULT_TOPK,
        expert_bias="--moe-router-enable-expert-bias" in arguments,
    )


def _said(arguments: Arguments, name: str) -> object:
    return arguments.text(name) or True


def _recompute_under_zero(arguments: Arguments) -> Iterator[Problem]:
    recomputes = arguments.text("--recompute-granularity") == "full" or "moe" in (
        arguments.values("--recompute-modules") or ()
    )
    if not recomputes or not any(name in arguments for name in _ZERO) or arguments.number("--zero-stage") == 0:
        return
    name = "--recompute-granularity" if "--recompute-granularity" in arguments else "--recompute-modules"
    valid = (
        "with ZeRO 1, 2 or 3 it loses gradients of tied experts outside of this project's engine: the gradient hook "
        "of a bank fires once a layer; train with megatron_tied.pretrain, or without recompute of experts"
    )
    yield Problem(name, " ".join(arguments.values(name) or ()), valid)


def _capacity(arguments: Arguments) -> Iterator[Problem]:
    name = "--moe-expert-capacity-factor"
    if name in arguments:
        valid = (
            "stays a limit of each layer: the layers of a group drop different tokens on the way to the same expert; "
            "nothing to change, but look at the dropped share of every layer"
        )
        yield Problem(name, _said(arguments, name), valid)


def _dense_prefix(arguments: Arguments) -> Iterator[Problem]:
    name = "--first-k-dense-replace"
    layers = arguments.number("--num-layers")
    if (dense := arguments.number(name)) is not None and dense > 0:
        rest = f"[1]*{layers - dense}" if layers else "[1]*the rest"
        valid = f"is not read by the launcher: say --moe-layer-freq '([0]*{dense}+{rest})' instead"
        yield Problem(name, dense, valid)


def _pipeline(arguments: Arguments, topology: TieTopology) -> Iterator[Problem]:
    if told := parted_groups(arguments, topology):
        name = laid_out_by(arguments)
        yield Problem(name, _said(arguments, name), told)


def _edge_layers(arguments: Arguments, topology: TieTopology) -> Iterator[Problem]:
    """FP8 with first and last layers in bf16: a group with layers of both kinds computes with one bank in two ways."""
    name = "--first-last-layers-bf16"
    if name not in arguments or not any(each in arguments for each in _FP8):
        return
    start, end = (count if (count := arguments.number(each)) is not None else default for each, default in _EDGES)
    edge = {*range(start), *range(topology.num_layers - end, topology.num_layers)}
    mixed = [list(bank.layers) for bank in topology.banks if edge & set(bank.layers) and set(bank.layers) - edge]
    if mixed:
        groups = ", ".join(map(str, mixed))
        valid = (
            f"keeps {start} first and {end} last layers in bf16, which cuts through the tie groups of layers {groups}: "
            "one bank would be used in two precisions; skip these layers with --tie-skip-first and --tie-skip-last"
        )
        yield Problem(name, True, valid)
