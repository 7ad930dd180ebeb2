"""What Megatron-LM's arguments must be for tied experts, known before any model is built."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.megatron_lm.arguments import NAMES, flag, tie_config, ties, topology_from_args
from megatron_tied.megatron_lm.refused import REFUSED, graph_refusal, refusal, width_misfits
from megatron_tied.planner.pipeline import aligned_cut, boundaries, even_cut, layout_argument, straddling
from megatron_tied.topology import TieConfig, TieTopology

# Flags with which the user has laid out the pipeline.
_LAYOUT = (
    "pipeline_model_parallel_layout",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)


def check_and_align(args: Namespace) -> None:
    """Before Megatron-LM's own checks: refuse what tying rules out, and cut an even pipeline between tie groups.

    Raises `ConfigError` in the names of the flags.
    """
    if not ties(args):
        _refuse_idle_flags(args)
        return
    topology = topology_from_args(args)
    if problems := list(_refused(args)):
        raise ConfigError(problems)
    chunks = _even_chunks(args)
    if topology.tie.pipeline == "allreduce" or chunks is None or any(getattr(args, name, None) for name in _LAYOUT):
        return
    even = even_cut(args.num_layers, chunks)
    if even is not None and straddling(topology, even):
        _align(args, topology, chunks, even)


def check_resolved(args: Namespace) -> None:
    """After Megatron-LM's own checks, which translate old flags: refuse what tying rules out.

    A pipeline whose chunks part a tie group is refused with a layout that would do. Raises `ConfigError`.
    """
    if not ties(args):
        _refuse_idle_flags(args)
        return
    topology = topology_from_args(args)
    problems = [*_refused(args), *_width_misfits(args, topology.tie.num_tied_experts)]
    cut = _resolved_cut(args)
    if cut is not None and straddling(topology, cut):
        problems += [_parted(args, topology, cut)] if topology.tie.pipeline == "align" else _refused_with_copies(args)
    if problems:
        raise ConfigError(problems)


def check_same_banks(args: Namespace, checkpoint_args: Namespace) -> None:
    """Raise `ConfigError` if the checkpoint's layers share experts in another way than this run's."""
    here, saved = (_words(each) for each in (args, checkpoint_args))
    if here != saved:
        valid = f"must be that of the checkpoint, {saved}, or --load left out"
        raise ConfigError(Problem("expert banks by layer", here, valid))


def _words(args: Namespace) -> str:
    if not ties(args):
        return "untied"
    topology = topology_from_args(args)
    words = ",".join("-" if bank is None else str(bank) for bank in topology.bank_of_layer)
    width = topology.tie.num_tied_experts
    return f"{words} with {width} tied experts" if width else words


def _refuse_idle_flags(args: Namespace) -> None:
    """A flag that changes nothing is a mistake: the group size, or the experts, have been forgotten."""
    default, asked = TieConfig(), tie_config(args)
    if asked.group_size != 1 or asked.banks is not None:
        raise ConfigError(Problem("--num-experts", None, "must be given for tied experts: the model has none"))
    for name, default_value in vars(default).items():
        if (value := getattr(asked, name)) != default_value:
            valid = "has no effect without --moe-tie-group-size or --moe-tie-banks"
            raise ConfigError(Problem(flag(NAMES[name]), value, valid))


def _refused(args: Namespace) -> Iterator[Problem]:
    for name in REFUSED:
        if value := getattr(args, name, None):
            yield refusal(name, value)
    if getattr(args, "cuda_graph_impl", "none") != "none":
        yield graph_refusal(args.cuda_graph_impl)


def _width_misfits(args: Namespace, experts: int | None) -> Iterator[Problem]:
    if experts is not None:
        yield from width_misfits(
            experts,
            expert_parallel=args.expert_model_parallel_size,
            router_groups=getattr(args, "moe_router_num_groups", None),
            topk=args.moe_router_topk,
            expert_bias=getattr(args, "moe_router_enable_expert_bias", False),
        )


def _refused_with_copies(args: Namespace) -> Iterator[Problem]:
    """What Megatron-Core does not do right for weights of which several stages hold a copy."""
    for name, reason in (
        ("log_params_norm", "asserts that no expert is shared"),
        ("fp8_param_gather", "updates copies from values that were drawn on each stage"),
        ("fp4_param_gather", "updates copies from values that were drawn on each stage"),
    ):
        if value := getattr(args, name, None):
            valid = f"cannot be used where pipeline stages hold copies of a bank: it {reason}"
            yield Problem(flag(name), value, f"{valid}; take it out, or set --moe-tie-pipeline align")


def _even_chunks(args: Namespace) -> int | None:
    """How many model chunks an even pipeline has; None without a pipeline, or when its sizes do not fit."""
    stages: int = args.pipeline_model_parallel_size
    if stages == 1 or args.num_layers % stages:
        return None
    virtual = getattr(args, "num_virtual_stages_per_pipeline_rank", None) or 1
    if size := getattr(args, "num_layers_per_virtual_pipeline_stage", None):
        virtual, rest = divmod(args.num_layers // stages, size)
        if rest:
            return None
    return stages * virtual


def _align(args: Namespace, topology: TieTopology, chunks: int, even: Sequence[int]) -> None:
    cut = aligned_cut(topology, chunks)
    if cut is None:
        raise ConfigError(_parted(args, topology, even))
    args.pipeline_model_parallel_layout = layout_argument(cut, getattr(args, "mtp_num_layers", None) or 0)
    args.num_virtual_stages_per_pipeline_rank = args.num_layers_per_virtual_pipeline_stage = None
    if args.rank == 0:
        print(
            f"--moe-tie-pipeline align: the pipeline is cut between tie groups, {boundaries(cut)} "
            f"(--pipeline-model-parallel-layout '{args.pipeline_model_parallel_layout}'); "
            f"the largest part has {max(cut)} layers, of an even cut {max(even)}",
            flush=True,
        )


def _resolved_cut(args: Namespace) -> tuple[int, ...] | None:
    """The cut that Megatron-Core will build, in pipeline order; None without a pipeline."""
    stages = args.pipeline_model_parallel_size
    if stages == 1:
        return None
    from megatron_tied.megatron_lm.pipeline_cut import layers_of_chunks

    return layers_of_chunks(args, stages)


def _parted(args: Namespace, topology: TieTopology, cut: Sequence[int]) -> Problem:
    parted = ", ".join(str(list(bank.layers)) for bank in straddling(topology, cut))
    works = aligned_cut(topology, len(cut))
    if works is None:
        way = f"no cut into {len(cut)} leaves the groups whole; use fewer stages, or"
    else:
        argument = layout_argument(works, getattr(args, "mtp_num_layers", None) or 0)
        way = f"--pipeline-model-parallel-layout '{argument}' works ({boundaries(works)}); or"
    valid = f"parts the tie groups of layers {parted}: {way} --moe-tie-pipeline allreduce"
    given = next((name for name in _LAYOUT if getattr(args, name, None)), "pipeline_model_parallel_size")
    return Problem(flag(given), str(getattr(args, given)), f"({boundaries(cut)}) {valid}")
