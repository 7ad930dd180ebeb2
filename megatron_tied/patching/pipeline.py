"""Where Megatron-LM's arguments cut a pipeline, and which tie groups such a cut parts."""

from __future__ import annotations

import re

from megatron_tied.errors import listed
from megatron_tied.patching.arguments import Arguments
from megatron_tied.planner.pipeline import aligned_cut, boundaries, layout_argument, straddling
from megatron_tied.topology import TieTopology

_LAYOUT = "--pipeline-model-parallel-layout"
_FIRST, _LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
_ENDS = ("--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split")
# With one of these the user has laid out the pipeline, and the launcher leaves it so.
_LAID_OUT = (_LAYOUT, _FIRST, _LAST, *_ENDS)

_TOLD = 4  # groups and parts; of more, only how many there are


def pipeline_cut(arguments: Arguments, num_layers: int) -> tuple[int, ...] | None:
    """The decoder layers of each model chunk, in pipeline order; None without a pipeline, or if it is not said."""
    stages = arguments.number("--pipeline-model-parallel-size")
    if stages is None or stages < 2:
        return None
    if _LAYOUT in arguments:
        text = arguments.text(_LAYOUT)
        cut = None if text is None else layout_cut(text)
    else:
        cut = _stage_sizes(arguments, num_layers, stages)
        cut = cut and _in_chunks(arguments, cut)
    return cut if cut and sum(cut) == num_layers else None


def layout_cut(text: str) -> tuple[int, ...]:
    """The decoder layers of each chunk of a layout such as `Et*3|(tt|)*29,m|L`."""
    text = re.sub(r"[\\'\",\s]", "", text)
    for repeated in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        text = re.sub(repeated, lambda match: match.group(1) * int(match.group(2)), text)
    return tuple(chunk.count("t") for chunk in text.split("|"))


def parted_groups(arguments: Arguments, topology: TieTopology) -> str | None:
    """What the launcher will do about tie groups that stages part, or None where none is parted."""
    cut = pipeline_cut(arguments, topology.num_layers)
    if cut is None or not (banks := straddling(topology, cut)):
        return None
    parted = listed([list(bank.layers) for bank in banks], _TOLD)
    told = f"({_words(cut)}) parts the tie groups of layers {parted}"
    if topology.tie.pipeline == "allreduce":
        return f"{told}: each stage keeps a copy of their experts, and their gradients are summed"
    works = aligned_cut(topology, len(cut))
    if works is None:
        return f"{told}, and no cut into {len(cut)} leaves them whole: use fewer stages, or --tie-pipeline allreduce"
    argument = f"{_LAYOUT} '{layout_argument(works, arguments.number('--mtp-num-layers') or 0)}'"
    if any(name in arguments for name in _LAID_OUT):
        return f"{told}, which the run refuses: {argument} works, or --tie-pipeline allreduce"
    return (
        f"{told}: the run is cut between them, {_words(works)}, at most {max(works)} layers a stage and not "
        f"{max(cut)}; to keep the even cut, --tie-pipeline allreduce"
    )


def _words(cut: tuple[int, ...]) -> str:
    if len(cut) > _TOLD and len(set(cut)) == 1:
        return f"{len(cut)} parts of {cut[0]} layers" if cut[0] > 1 else f"{len(cut)} parts of one layer"
    return boundaries(cut)


def laid_out_by(arguments: Arguments) -> str:
    """The flag that decides where the pipeline is cut."""
    return next((name for name in _LAID_OUT if name in arguments), "--pipeline-model-parallel-size")


def _stage_sizes(arguments: Arguments, num_layers: int, stages: int) -> tuple[int, ...] | None:
    first, last = arguments.number(_FIRST), arguments.number(_LAST)
    if (first is None and _FIRST in arguments) or (last is None and _LAST in arguments):
        return None
    given = [size for size in (first, last) if size is not None]
    between = stages - len(given)
    embedding, loss = (name in arguments for name in _ENDS)
    layers = num_layers - sum(given) + (not given) * (embedding + loss)
    if between and layers % between:
        return None
    even = [layers // between] * between if between else []
    sizes = [*([first] if first is not None else []), *even, *([last] if last is not None else [])]
    sizes[0] -= embedding and not given
    sizes[-1] -= loss and not given
    return tuple(sizes)


def _in_chunks(arguments: Arguments, sizes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Interleaved stages: each is divided into chunks, and a token passes the first of every stage first."""
    chunks = arguments.number("--num-virtual-stages-per-pipeline-rank") or 1
    if layers := arguments.number("--num-layers-per-virtual-pipeline-stage"):
        chunks, rest = divmod(max(sizes), layers)
        if rest:
            return None
    if any(size % chunks for size in sizes):
        return None
    return tuple(size // chunks for _ in range(chunks) for size in sizes)
