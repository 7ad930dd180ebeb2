"""One conversion from beginning to end: read, retie, write, check, publish."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from megatron_tied.convert import hf_output
from megatron_tied.convert.checkpoint_output import checkpoint_pieces, run_of, write_checkpoint
from megatron_tied.convert.companions import Companions
from megatron_tied.convert.hf_source import HuggingFaceSource
from megatron_tied.convert.memory import lacking_memory
from megatron_tied.convert.output import absolute, check_space, claimed, published, scratch
from megatron_tied.convert.pieces import Piece, Written, total_bytes
from megatron_tied.convert.precision import NAMES, PRECISIONS
from megatron_tied.convert.retied import AverageMerge, Merge, OwnerMerge, RetiedSource
from megatron_tied.convert.self_check import TOLERANCE, compare, require_transformers
from megatron_tied.convert.sources import CheckpointSource, WeightSource
from megatron_tied.errors import ConfigError, Problem, listed
from megatron_tied.topology import TieConfig, TieTopology

_Base = HuggingFaceSource | CheckpointSource
_Say = Callable[[str], object]
_Pieces = Callable[[WeightSource], Iterator[Piece]]
_Write = Callable[[WeightSource, Written, Path], None]

# `matched` is known when it has seen text; what it makes is as large.
_MERGES: dict[str, Merge] = {"average": AverageMerge(), "owner": OwnerMerge(), "matched": OwnerMerge()}


@dataclass(frozen=True)
class Conversion:
    """What is asked for. `tie` None leaves the banks as they are; `tokenizer` None takes the model's own."""

    source_format: Literal["hf", "megatron-tied"]
    target_format: Literal["hf", "hf-compact", "megatron-tied"]
    input: Path
    output: Path
    tie: TieConfig | None = None
    method: Literal["owner", "average", "matched"] = "average"
    calibration: Path | None = None
    calibration_tokens: int | None = None
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    tokenizer: str | None = None
    verify: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", absolute(self.output))


def convert(asked: Conversion, say: _Say = print) -> None:
    """Do it; `say` is given what people should know. Raises `ConfigError`, and then leaves nothing behind."""
    _check_method(asked)
    with claimed(asked.output):
        _convert(asked, say)


def _convert(asked: Conversion, say: _Say) -> None:
    base = _open(asked)
    if asked.verify and (asked.source_format == "hf" or asked.target_format != "megatron-tied"):
        require_transformers()
    for remark in base.remarks:
        say(f"warning: {remark}")
    topology = _new_topology(base, asked)
    source = base if topology is None else RetiedSource(base, topology, _MERGES[asked.method])
    pieces, write = _target(asked, base, source, say)
    size = total_bytes(pieces(source))
    # Calibration text is there with `matched` alone.
    if topology is None or asked.calibration is None:
        check_space(asked.output, size)
        _check_content(base)
        _publish(asked, base, source, pieces, write, say)
        return
    from megatron_tied.convert.matched import match, scratch_bytes

    # Before experts are looked at, which takes time.
    check_space(asked.output, size + scratch_bytes(base, topology))
    _check_content(base)
    with scratch(asked.output) as directory:
        merge = match(
            base,
            topology,
            asked.calibration,
            directory,
            tokens=asked.calibration_tokens,
            longest=_longest(base),
            say=say,
        )
        _publish(asked, base, RetiedSource(base, topology, merge), pieces, write, say)


def _publish(asked: Conversion, base: _Base, source: WeightSource, pieces: _Pieces, write: _Write, say: _Say) -> None:
    verify = asked.verify
    if verify and (reason := lacking_memory(source)):
        say(f"warning: the result will not be checked: {reason}")
        verify = False
    size = total_bytes(pieces(source))
    with published(asked.output) as staging:
        with tqdm(total=size, desc="converting", unit="B", unit_scale=True, leave=False, disable=None) as progress:
            written = Written(pieces(source), progress.update)
            write(source, written, staging)
        if written.not_finite:
            _tell_not_finite(asked, written.not_finite, say)
        if verify:
            _check(source, staging, _wanted(asked, base), say)
    say(f"{asked.output}: {source.topology.describe()}; {size:,} bytes of weights")


def _tell_not_finite(asked: Conversion, names: list[str], say: _Say) -> None:
    precision = "" if asked.dtype == "auto" else f", or too large for --dtype {asked.dtype}"
    told = f"has numbers that are not finite{precision}, in {listed(names)}"
    if asked.verify:
        raise ConfigError(Problem("--input", str(asked.input), f"{told}; --no-verify converts them all the same"))
    say(f"warning: {asked.input} {told}")


def _open(asked: Conversion) -> _Base:
    if not asked.input.is_dir():
        raise ConfigError(Problem("--input", str(asked.input), "must be a directory"))
    if asked.source_format == "hf":
        return HuggingFaceSource(asked.input)
    base = CheckpointSource(asked.input)
    if asked.target_format != "megatron-tied":
        base.config = base.config.model_copy(update={"max_position_embeddings": _longest(base)})
    return base


def _check_content(base: _Base) -> None:
    """Read all of a checkpoint for its checksums, which takes time: when all else is known to be well."""
    if isinstance(base, CheckpointSource):
        base.check_content()


def _longest(base: _Base) -> int | None:
    """The longest sequence the model is for: a run whose model sets no limit has that of its training."""
    limit = base.config.max_position_embeddings
    return limit if limit or isinstance(base, HuggingFaceSource) else base.manifest.run["train"].get("seq_length")


def _new_topology(base: _Base, asked: Conversion) -> TieTopology | None:
    """None where the banks stay as they are."""
    if asked.tie is None:
        return None
    topology = base.config.topology(asked.tie)
    return None if topology.bank_of_layer == base.topology.bank_of_layer else topology


def _check_method(asked: Conversion) -> None:
    """Options that say nothing without one another."""
    matched, calibration = asked.method == "matched", asked.calibration
    if matched and asked.tie is None:
        raise ConfigError(Problem("--tie-method", "matched", "must come with --tie-group-size or --tie-banks"))
    if matched and calibration is None:
        raise ConfigError(Problem("--calibration", None, "must be given with --tie-method matched"))
    if not matched and calibration is not None:
        raise ConfigError(Problem("--calibration", str(calibration), "is for --tie-method matched"))
    if asked.calibration_tokens is not None and (not matched or asked.calibration_tokens < 1):
        valid = "must be at least 1, and is for --tie-method matched"
        raise ConfigError(Problem("--calibration-tokens", asked.calibration_tokens, valid))


def _wanted(asked: Conversion, base: WeightSource) -> torch.dtype | None:
    """None keeps each tensor's own: of what was imported, and of a checkpoint that stays one."""
    if asked.dtype != "auto":
        return PRECISIONS[asked.dtype]
    if isinstance(base, CheckpointSource) and _is_trained(base) and asked.target_format != "megatron-tied":
        return PRECISIONS[base.manifest.run["train"]["precision"]]
    return None


def _is_trained(base: WeightSource) -> bool:
    """Whether the weights are those of a run here, retied or not."""
    return isinstance(base, CheckpointSource) and not base.manifest.trainer.get("imported", False)


def _target(asked: Conversion, base: _Base, source: WeightSource, say: _Say) -> tuple[_Pieces, _Write]:
    """What will be written of a source like `source`, and what writes it; all that goes with it is found and sound."""
    wanted = _wanted(asked, base)
    companions = Companions.of(base, asked.tokenizer, exported=asked.target_format != "megatron-tied")
    if asked.target_format == "megatron-tied":
        run = base.manifest.run if isinstance(base, CheckpointSource) else run_of(source, asked.output)
        if wanted is not None and not _is_trained(base):
            run = run | {"train": run["train"] | {"precision": NAMES[wanted]}}

        def write_ours(source: WeightSource, written: Written, staging: Path) -> None:
            write_checkpoint(source, written, staging, run=run, imported=not _is_trained(base))
            companions.put_beside_checkpoint(staging)

        return lambda source: checkpoint_pieces(source, wanted), write_ours
    compact = asked.target_format == "hf-compact"
    json_config = (hf_output.compact_config if compact else hf_output.plain_config)(source.config, source.topology)
    for warning in () if compact else hf_output.serving_warnings(source.config):
        say(f"warning: {warning}")

    def write_theirs(source: WeightSource, written: Written, staging: Path) -> None:
        keys = companions.put_into_model(staging)
        hf_output.write_hf(written, staging, json_config=json_config | keys, compact=compact)

    return lambda source: hf_output.hf_pieces(source, wanted, compact=compact), write_theirs


def _check(source: WeightSource, staging: Path, wanted: torch.dtype | None, say: _Say) -> None:
    difference = compare(source, staging, wanted)
    told = (
        "what was written against what was converted: largest difference of logits on random tokens, in float32: "
        f"{difference.absolute:.2e}"
    )
    if not difference.relative <= TOLERANCE:
        valid = f"{told}, {difference.relative:.1e} of the largest logit: more than {TOLERANCE}; nothing was written"
        raise ConfigError(Problem("the check of what was written", f"{difference.relative:.1e}", valid))
    say(f"{told} ({difference.relative:.1e} of the largest)")
