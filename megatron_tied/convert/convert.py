"""One conversion from beginning to end: read, retie, write, check, publish."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from megatron_tied.convert import hf_output, tokenizer
from megatron_tied.convert.checkpoint_output import checkpoint_bytes, run_of, write_checkpoint
from megatron_tied.convert.hf_source import HuggingFaceSource
from megatron_tied.convert.output import check_output, check_space, published, scratch
from megatron_tied.convert.precision import PRECISIONS
from megatron_tied.convert.retied import AverageMerge, Merge, OwnerMerge, RetiedSource
from megatron_tied.convert.self_check import TOLERANCE, compare, lacking_memory, require_transformers
from megatron_tied.convert.sources import CheckpointSource, WeightSource
from megatron_tied.errors import ConfigError, Problem
from megatron_tied.topology import TieConfig, TieTopology

_Base = HuggingFaceSource | CheckpointSource
_Say = Callable[[str], object]
_Write = Callable[[WeightSource, Path, Callable[[int], object]], None]

# `matched` is known when it has seen text; what it makes is as large.
_MERGES: dict[str, Merge] = {"average": AverageMerge(), "owner": OwnerMerge(), "matched": OwnerMerge()}

# Where a checkpoint keeps what only a Hugging Face model needs.
HF_FILES = "hf"


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


def convert(asked: Conversion, say: _Say = print) -> None:
    """Do it; `say` is given what people should know. Raises `ConfigError`, and then leaves nothing behind."""
    check_output(asked.output)
    _check_method(asked)
    if asked.verify and (asked.source_format == "hf" or asked.target_format != "megatron-tied"):
        require_transformers()
    base = _open(asked)
    for remark in base.remarks:
        say(f"warning: {remark}")
    topology = _new_topology(base, asked)
    source = base if topology is None else RetiedSource(base, topology, _MERGES[asked.method])
    write, size = _writer(asked, base, source, say)
    if topology is None or asked.method != "matched":
        check_space(asked.output, size)
        _convert(asked, base, source, write, size, say)
        return
    from megatron_tied.convert.matched import match, scratch_bytes

    # Before experts are looked at, which takes time.
    check_space(asked.output, size + scratch_bytes(base, topology))
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
        _convert(asked, base, RetiedSource(base, topology, merge), write, size, say)


def _convert(asked: Conversion, base: _Base, source: WeightSource, write: _Write, size: int, say: _Say) -> None:
    verify = asked.verify
    if verify and (reason := lacking_memory(source)):
        say(f"warning: the result will not be checked: {reason}")
        verify = False
    with published(asked.output) as staging:
        with tqdm(total=size, desc="converting", unit="B", unit_scale=True, leave=False, disable=None) as progress:
            write(source, staging, progress.update)
        if verify:
            _check(source, staging, _wanted(asked, base), say)
    say(f"{asked.output}: {source.topology.describe()}; {size:,} bytes of weights")


def _open(asked: Conversion) -> _Base:
    if not asked.input.is_dir():
        raise ConfigError(Problem("--input", str(asked.input), "must be a directory"))
    if asked.source_format == "hf":
        return HuggingFaceSource(asked.input)
    base = CheckpointSource(asked.input)
    if asked.target_format != "megatron-tied":
        base.config = base.config.model_copy(update={"max_position_embeddings": _longest(base)})
    return base


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


def _writer(
    asked: Conversion,
    base: _Base,
    source: WeightSource,
    say: _Say,
) -> tuple[_Write, int]:
    """What writes a source like `source` into a directory, and how many bytes of tensors that will be."""
    wanted = _wanted(asked, base)
    if asked.target_format == "megatron-tied":
        run = base.manifest.run if isinstance(base, CheckpointSource) else run_of(source, asked.output)
        files = _carried(base)
        given = _given_tokenizer(asked)

        def write(source: WeightSource, staging: Path, advance: Callable[[int], object]) -> None:
            imported = not _is_trained(base)
            write_checkpoint(source, staging, run=run, imported=imported, wanted=wanted, advance=advance)
            _put_hf_files(files, given, staging / HF_FILES)

        return write, checkpoint_bytes(source, wanted)
    compact = asked.target_format == "hf-compact"
    json_config = (hf_output.compact_config if compact else hf_output.plain_config)(source.config, source.topology)
    for warning in () if compact else hf_output.serving_warnings(source.config):
        say(f"warning: {warning}")
    vocabulary = _tokenizer_of(asked, base)
    original = _original_config(base)

    def write_model(source: WeightSource, staging: Path, advance: Callable[[int], object]) -> None:
        special = tokenizer.put_tokenizer(vocabulary, staging) if vocabulary else {}
        tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        tokens |= hf_output.kept_keys(original) | special
        hf_output.write_hf(
            source,
            staging,
            json_config=json_config | tokens,
            wanted=wanted,
            compact=compact,
            advance=advance,
        )
        _put_generation_config(base, staging, special)

    return write_model, hf_output.hf_bytes(source, wanted, compact=compact)


def _check(source: WeightSource, staging: Path, wanted: torch.dtype | None, say: _Say) -> None:
    difference = compare(source, staging, wanted)
    told = f"largest difference of logits on random tokens, in float32: {difference.absolute:.2e}"
    if not difference.relative <= TOLERANCE:
        valid = f"{told}, {difference.relative:.1e} of the largest logit: more than {TOLERANCE}; nothing was written"
        raise ConfigError(Problem("the check of what was written", f"{difference.relative:.1e}", valid))
    say(f"{told} ({difference.relative:.1e} of the largest)")


def _hf_directory(base: _Base) -> Path | None:
    """Where the Hugging Face files of `base` are: its own, or of the conversion that its run began with."""
    if isinstance(base, HuggingFaceSource):
        return base.directory
    init_from = base.manifest.run["train"].get("init_from")
    places = [base.directory / HF_FILES, *([Path(init_from) / HF_FILES] if init_from else [])]
    return next((place for place in places if place.is_dir()), None)


def _carried(base: _Base) -> list[Path]:
    directory = _hf_directory(base)
    if directory is None:
        return []
    others = [directory / name for name in ("config.json", tokenizer.GENERATION_CONFIG)]
    return [*tokenizer.tokenizer_files(directory), *(path for path in others if path.is_file())]


def _given_tokenizer(asked: Conversion) -> Path | None:
    if asked.tokenizer in (None, tokenizer.NO_TOKENIZER):
        return None
    path = Path(asked.tokenizer)
    if not path.exists():
        raise ConfigError(Problem("--tokenizer", asked.tokenizer, "is not there"))
    return path


def _tokenizer_of(asked: Conversion, base: _Base) -> Path | None:
    """The directory or SentencePiece model that has it; None where none is wanted. Raises `ConfigError`."""
    if asked.tokenizer is not None:
        return _given_tokenizer(asked)
    directory = _hf_directory(base)
    if directory is not None and tokenizer.tokenizer_files(directory):
        return directory
    trained_with = base.manifest.run["data"].get("tokenizer") if isinstance(base, CheckpointSource) else None
    if trained_with and Path(trained_with).is_file():
        return Path(trained_with)
    where = f"the run's {trained_with} is not there" if trained_with else f"{asked.input} has none"
    valid = f"must be given, a directory or a SentencePiece model, since {where}; or {tokenizer.NO_TOKENIZER}"
    raise ConfigError(Problem("--tokenizer", None, valid))


def _put_hf_files(files: list[Path], given: Path | None, directory: Path) -> None:
    if not files and given is None:
        return
    directory.mkdir()
    for file in files:
        shutil.copyfile(file, directory / file.name)
    if given is not None:
        for file in tokenizer.tokenizer_files(directory):
            file.unlink()
        tokenizer.put_tokenizer(given, directory)


def _original_config(base: _Base) -> dict[str, Any]:
    directory = _hf_directory(base)
    path = None if directory is None else directory / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else {}


def _put_generation_config(base: _Base, staging: Path, special: tokenizer.Special) -> None:
    directory = _hf_directory(base)
    if directory is not None and (directory / tokenizer.GENERATION_CONFIG).is_file():
        shutil.copyfile(directory / tokenizer.GENERATION_CONFIG, staging / tokenizer.GENERATION_CONFIG)
        return
    known = {key: value for key, value in special.items() if value is not None}
    hf_output.write_json(staging / tokenizer.GENERATION_CONFIG, known)
