"""A checkpoint's model for inference: found and described first, loaded when all else is known to be well."""

# ruff: noqa: E402  (Megatron-Core must be imported after the host is prepared)
from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_tied.platform import prepare

prepare()

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.experts import HAVE_TE

from megatron_tied.checkpoint.directory import resolve
from megatron_tied.checkpoint.loader import Checkpoint, load_weights
from megatron_tied.checkpoint.manifest import BrokenCheckpointError, Manifest
from megatron_tied.data.adapters import is_tiktoken
from megatron_tied.errors import ConfigError, Problem
from megatron_tied.models.config import ModelConfig
from megatron_tied.models.gpt import HOST_OPTIONS, build_gpt_model
from megatron_tied.models.latent_attention import is_latent
from megatron_tied.topology import TieConfig

# Where an expert takes so many tokens and no more, one text's result depends on the others beside it.
_DROPPING = ("moe_expert_capacity_factor", "moe_pad_expert_input_to_capacity")
_EMBEDDING = "weight/embedding.word_embeddings.weight"
HF_FILES = "hf"  # beside a conversion's weights: what only a Hugging Face model needs
_DEFAULT_LENGTH = 2048


@dataclass(frozen=True)
class TrainedModel:
    """What the checkpoint in `path` says of its model; no weight has been read. `run` is the config of its training."""

    path: Path
    manifest: Manifest
    config: ModelConfig
    tie: TieConfig

    @property
    def run(self) -> dict[str, Any]:
        """The sections of the run's config; those of a conversion have few keys."""
        return self.manifest.run

    @property
    def vocab_size(self) -> int:
        """How many token ids the model knows."""
        return self.manifest.tensors[_EMBEDDING].shape[0]

    @property
    def precision(self) -> str:
        """fp32, bf16 or fp16: of the training, or of the model that was imported."""
        precision: str = self.run["train"]["precision"]
        return precision

    @property
    def seq_length(self) -> int:
        """How long the sequences of the training were, as far as it is known."""
        return self.run["train"].get("seq_length") or self.config.max_position_embeddings or _DEFAULT_LENGTH

    @property
    def tokenizer(self) -> str | Path | None:
        """The tokenizer of the training, or of the model that was imported; None where neither is on this machine."""
        trained_with: str | None = self.run["data"].get("tokenizer")
        if trained_with and is_tiktoken(trained_with):
            return trained_with
        places = [*([Path(trained_with)] if trained_with else []), self.path / HF_FILES]
        return next((place for place in places if place.exists()), None)


def find_model(directory: Path, *, field: str = "--checkpoint") -> TrainedModel:
    """The model of a checkpoint, or of a run's latest one; reads no weights, and needs no process groups.

    Raises `ConfigError` about `field` for what is no complete checkpoint.
    """
    try:
        path = resolve(directory)
        manifest = Manifest.read(path)
        manifest.check_presence(path)
    except BrokenCheckpointError as error:
        valid = f"must be a checkpoint, or a run that has one: {error}"
        raise ConfigError(Problem(field, str(directory), valid)) from None
    vocab_size = manifest.tensors[_EMBEDDING].shape[0]
    config = ModelConfig.resolve(manifest.run["model"]).model_copy(update={"vocab_size": vocab_size})
    # No gradient is taken here, and a way to take it would ask for one kind of experts.
    tie = replace(TieConfig(**manifest.run["tie"]), weight_gradient="auto")
    return TrainedModel(path, manifest, inference_config(config), tie)


def inference_config(config: ModelConfig) -> ModelConfig:
    """The same model without what is for training or for another host: no token is dropped, whoever is beside it."""
    fields = {name: value for name, value in config.model_dump().items() if name not in _DROPPING}
    fields |= {name: False for name, (_, is_here) in HOST_OPTIONS.items() if name in fields and not is_here()}
    if fields["expert_backend"] == "te" and not HAVE_TE:
        fields["expert_backend"] = "grouped"
    if is_latent(config) and "apply_rope_fusion" in fields:
        fields["apply_rope_fusion"] = False  # which Megatron-Core has for training only
    return ModelConfig.resolve(fields)


def load_model(found: TrainedModel, *, precision: str | None = None) -> GPTModel:
    """The model with its weights on this process's device, in eval mode, in `precision` (default: the training's).

    Whatever ranks the checkpoint was written by, each rank takes what is its own in the process groups at hand
    (`one_process`, or `engine.groups.initialize_model_parallel`). A collective. Raises `ConfigError` for a model that
    this host or these groups cannot have, and `RankError` where a file cannot be read.
    """
    model = build_gpt_model(found.config, found.tie, precision=precision or found.precision)
    load_weights(model, Checkpoint(found.path, found.manifest))
    return model.requires_grad_(False).eval()
