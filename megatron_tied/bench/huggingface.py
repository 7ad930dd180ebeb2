"""The paper's approach as a contender: the Hugging Face model, its experts aliased, all of it on every rank."""

# ruff: noqa: E402  (Megatron-Core must be imported after the host is prepared)
from __future__ import annotations

from typing import Any

import torch

from megatron_tied.platform import device, prepare

prepare()

from megatron.core import parallel_state

from megatron_tied.bench.contender import CannotRunHereError, Contender, Engine
from megatron_tied.bench.job import HUGGINGFACE, TIED, Job, transformers_json
from megatron_tied.bench.phases import Phases
from megatron_tied.bench.plain_engine import PlainEngine
from megatron_tied.convert.tensors import entries, fused_name
from megatron_tied.layers.backends import expert_matrices
from megatron_tied.layers.moe_layer import TiedMoELayer, tied_layers
from megatron_tied.models.config import ModelConfig
from megatron_tied.models.gpt import build_gpt_model
from megatron_tied.topology import TieTopology
from megatron_tied.training.config import RunConfig
from megatron_tied.training.evaluation import Batch

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_huggingface(job: Job) -> Contender:
    """The tied model of transformers, its `grouped_mm` experts shared within each tie group, from the same weights."""
    config = job.config_of(TIED)
    model = transformers_model(config)
    copy_weights(config, model)
    tie_experts(model, config.topology())
    engine = PlainEngine(model.train(), config.optimizer, config.gradient_accumulation_steps(job.ranks))
    objective = TransformersLoss(model.config)
    return Contender(HUGGINGFACE, engine, objective, Phases(), reductions=1, shards_experts=False)


def transformers_model(config: RunConfig) -> Any:
    """The class of transformers that is `config.model`, untied, on this process's device. Raises CannotRunHereError."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise CannotRunHereError(f"transformers is not installed: {error}") from None
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**transformers_json(config)),
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
        dtype=_DTYPES[config.train.precision],
    )
    return model.to(device())


def tie_experts(model: Any, topology: TieTopology) -> None:
    """Make the layers of each bank use their owner's experts."""
    layers = model.model.layers
    for bank in topology.banks:
        for follower in bank.layers[1:]:
            layers[follower].mlp.experts = layers[bank.owner].mlp.experts


@torch.no_grad()
def copy_weights(config: RunConfig, model: Any) -> None:
    """Give `model` the weights that a run of `config` begins with; a collective."""
    sizes = config.model.model_dump() | {"expert_backend": "sequential"}
    ours = build_gpt_model(
        ModelConfig.resolve(sizes),
        config.tie,
        seed=config.train.seed,
        precision=config.train.precision,
        use_transformer_engine=False,
    )
    topology, theirs = config.topology(), model.state_dict()
    own = ours.state_dict()
    for entry in entries(config.model, topology):
        for name, part in zip(entry.theirs, entry.split(own[entry.ours]), strict=True):
            theirs[name].copy_(part)
    owners = {layer.layer_index: layer for layer in tied_layers(ours) if layer.is_owner}
    for bank in topology.banks:
        experts = _all_experts(owners[bank.owner])
        for layer in bank.layers:
            theirs[fused_name(layer, "gate")].copy_(torch.cat((experts["gate"], experts["up"]), dim=1))
            theirs[fused_name(layer, "down")].copy_(experts["down"])


def _all_experts(layer: TiedMoELayer) -> dict[str, torch.Tensor]:
    """Each kind of matrix of all experts of the layer's bank, stacked; a collective of the expert parallel ranks."""
    local = list(expert_matrices(layer.experts))
    group = parallel_state.get_expert_model_parallel_group()
    found = {}
    for kind in local[0]:
        mine = torch.stack([matrices[kind] for matrices in local])
        parts = [torch.empty_like(mine) for _ in range(group.size())]
        torch.distributed.all_gather(parts, mine, group=group)
        found[kind] = torch.cat(parts)
    return found


class TransformersLoss:
    """Cross entropy of one micro-batch [b, s]; its gradient has that of the class's own load balancing loss, too."""

    def __init__(self, hf_config: Any):
        self._coefficient = getattr(hf_config, "router_aux_loss_coef", None) or 0.0
        self._options = {"output_router_logits": True} if self._coefficient else {}

    def __call__(self, engine: Engine, batch: Batch) -> torch.Tensor:
        """A scalar for `engine.backward`."""
        tokens, labels = (batch[name].to(device(), non_blocking=True) for name in ("tokens", "labels"))
        output = engine(input_ids=tokens, labels=labels, shift_labels=labels, use_cache=False, **self._options)
        loss: torch.Tensor = output.loss
        # The value of the balancing loss is left out, so that losses of all contenders compare.
        return loss - self._coefficient * output.aux_loss.detach() if self._coefficient else loss
