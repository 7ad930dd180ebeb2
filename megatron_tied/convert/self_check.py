"""Does what was written compute what was read? Both are built, and given random tokens, in float32."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from megatron_tied.checkpoint import manifest
from megatron_tied.convert.hf_files import INDEX, weight_files
from megatron_tied.convert.hf_source import HuggingFaceSource
from megatron_tied.convert.retied import RetiedSource
from megatron_tied.convert.sources import CheckpointSource, WeightSource
from megatron_tied.convert.tensors import fused_name
from megatron_tied.convert.tokenizer import NO_TOKENS
from megatron_tied.errors import ConfigError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-4  # of the largest logit
# Odd, for the median: where two experts are chosen between by a hair, rounding can send one batch another way.
_BATCHES = 3
_SEQUENCES, _LENGTH = 2, 32


@dataclass(frozen=True)
class Difference:
    """The largest difference between logits, as such and over the largest logit; of several batches the median."""

    absolute: float
    relative: float


def require_transformers() -> None:
    """Raise `ConfigError` if a check, which needs them, could not be made."""
    if find_spec("transformers") is None:
        valid = "the check needs transformers: pip install 'transformers>=5', or give --no-verify to go without"
        raise ConfigError(Problem("--no-verify", False, valid))


def compare(source: WeightSource, written: Path, wanted: torch.dtype | None) -> Difference:
    """The difference between the model of `source`, its weights rounded to `wanted`, and the one in `written`."""
    generator = torch.Generator().manual_seed(0)
    length = min(_LENGTH, source.config.max_position_embeddings or _LENGTH)
    shape = (_SEQUENCES, length)
    batches = [torch.randint(source.vocab_size, shape, generator=generator) for _ in range(_BATCHES)]
    # One after the other: there need not be memory for two.
    expected = _with_model(lambda: _source_model(source), batches, wanted)
    found = _with_model(lambda: _written_model(written), batches, None)
    absolute = [(a - b).abs().max() for a, b in zip(expected, found, strict=True)]
    relative = [difference / a.abs().max() for difference, a in zip(absolute, expected, strict=True)]
    return Difference(torch.stack(absolute).median().item(), torch.stack(relative).median().item())


class _Built(NamedTuple):
    """A model, and its logits [batch, sequence, vocabulary] on tokens."""

    model: torch.nn.Module
    logits: Callable[[torch.Tensor], torch.Tensor]


def _with_model(
    build: Callable[[], _Built], batches: Sequence[torch.Tensor], wanted: torch.dtype | None
) -> list[torch.Tensor]:
    from megatron_tied.inference.processes import one_process

    with one_process(), torch.no_grad():
        built = build()
        if wanted is not None:
            for weight in built.model.parameters():
                weight.copy_(weight.to(wanted))
        return [built.logits(tokens) for tokens in batches]


def _source_model(source: WeightSource) -> _Built:
    """The model by the other side's own code wherever it has one: what is compared should not come from one hand."""
    from megatron_tied.convert import live_model

    base = source.base if isinstance(source, RetiedSource) else source
    if isinstance(base, HuggingFaceSource) and (base is source or not base.is_compact):
        built = _built_by_transformers(base.directory)
        if isinstance(source, RetiedSource):
            _overwrite(built.model, source)
        return built
    if isinstance(source, CheckpointSource):
        return _built_here(source.directory)
    model = live_model.model_of(source)
    return _Built(model, partial(live_model.logits, model))


def _written_model(directory: Path) -> _Built:
    return _built_here(directory) if (directory / manifest.NAME).is_file() else _built_by_transformers(directory)


def _built_here(checkpoint: Path) -> _Built:
    from megatron_tied.convert import live_model

    model = live_model.model_of_checkpoint(checkpoint)
    return _Built(model, partial(live_model.logits, model))


def _built_by_transformers(directory: Path) -> _Built:
    model = hugging_face_model(directory)

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        with _refusals_told(directory):
            found: torch.Tensor = model(tokens).logits
        return found.float()

    return _Built(model, logits)


def hugging_face_model(directory: Path) -> PreTrainedModel:
    """The directory's model by transformers, in float32.

    Of its files only the weights are read by transformers, and of its config.json only the keys of its architecture:
    others could have it load adapters, kernels or code that lies elsewhere.
    """
    import transformers

    from megatron_tied.convert import modeling_megatron_tied

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    source = HuggingFaceSource(directory)
    keys = source.architecture.schema.computing(source.json)
    if source.is_compact:
        model_class = getattr(modeling_megatron_tied, f"MegatronTied{source.architecture.causal_lm}")
        keys |= {key: source.json.get(key) for key in ("expert_banks", "num_tied_experts")}
    else:
        model_class = getattr(transformers, source.architecture.causal_lm)
    with _refusals_told(directory), tempfile.TemporaryDirectory() as weights:
        for file in (*weight_files(directory), directory / INDEX):
            if file.is_file():
                (Path(weights) / file.name).symlink_to(file.resolve())
        # Tokens have no part in it: their defaults may be beyond a small vocabulary.
        config = model_class.config_class(**keys, **NO_TOKENS)
        model: PreTrainedModel
        model, loading = model_class.from_pretrained(
            weights,
            config=config,
            generation_config=transformers.GenerationConfig(),
            dtype=torch.float32,
            attn_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    if lost := loading["missing_keys"] or loading["mismatched_keys"]:
        raise ConfigError(Problem("--output", str(directory), f"transformers does not find {sorted(lost)[:4]}"))
    return model


@contextmanager
def _refusals_told(directory: Path) -> Iterator[None]:
    """Whatever transformers raises is a `ConfigError`: it found fault with what it was given."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        told = " ".join(str(error).split())[:400]
        valid = f"cannot be checked, since transformers refuses it: {type(error).__name__}: {told}"
        raise ConfigError(Problem("--no-verify", False, f"{directory} {valid}")) from error


def _overwrite(model: torch.nn.Module, source: RetiedSource) -> None:
    """Put the merged experts, and the routers' permuted rows, in the place of what the model was loaded with."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for layer in source.topology.moe_layers:
        ours, theirs = f"decoder.layers.{layer}.mlp.router", f"model.layers.{layer}.mlp.gate"
        tensors[f"{theirs}.weight"].copy_(source.read(f"{ours}.weight"))
        if source.config.moe_router_enable_expert_bias:
            tensors[f"{theirs}.e_score_correction_bias"].copy_(source.read(f"{ours}.expert_bias"))
        gate, up = tensors[fused_name(layer, "gate")].chunk(2, dim=1)
        gate.copy_(source.read_experts(layer, "gate"))
        up.copy_(source.read_experts(layer, "up"))
        tensors[fused_name(layer, "down")].copy_(source.read_experts(layer, "down"))
