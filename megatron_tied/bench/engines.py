"""Contenders of this package's engine: tied, untied, and Megatron-Core's own layers and experts."""

# ruff: noqa: E402  (Megatron-Core must be imported after the host is prepared)
from __future__ import annotations

import copy

from megatron_tied.platform import device, prepare

prepare()

from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.moe.experts import HAVE_TE
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_tied.bench.contender import Contender
from megatron_tied.bench.job import MEGATRON_CORE, Job
from megatron_tied.bench.phases import Phases
from megatron_tied.engine.engine import TiedMoEEngine
from megatron_tied.engine.initialize import initialize
from megatron_tied.layers.initialization import initialize_experts
from megatron_tied.models.gpt import assemble, transformer_config
from megatron_tied.models.initialization import initialize_weights
from megatron_tied.training.config import RunConfig
from megatron_tied.training.evaluation import LossFunction
from megatron_tied.training.optimizer import build_optimizer
from megatron_tied.training.run import build_engine
from megatron_tied.training.schedule import lr_schedule


def build_ours(name: str, job: Job) -> Contender:
    """`tied` or `untied`, as a training run builds it."""
    engine, _, _ = build_engine(job.config_of(name))
    return _contender(name, engine, job)


def build_megatron_core(job: Job) -> Contender:
    """Megatron-Core's block with its own MoE layers, from the weights of `untied`, under the same engine."""
    config = job.config_of(MEGATRON_CORE)
    settings = config.optimizer
    model = plain_gpt_model(config)
    optimizer = build_optimizer(model, settings)
    schedule = lr_schedule(optimizer, config.train.steps, settings)
    engine, *_ = initialize(model, config.deepspeed_config(job.ranks), optimizer=optimizer, lr_scheduler=schedule)
    return _contender(MEGATRON_CORE, engine, job)


def plain_gpt_model(config: RunConfig) -> GPTModel:
    """The untied model made of Megatron-Core's own layers, with Transformer Engine where it is installed.

    OLMoE's norm and clipping, which Megatron-Core has not, are this package's, and so are the weights it begins with.
    """
    model, seed = config.model, config.train.seed
    transformer = transformer_config(model, precision=config.train.precision)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    own = copy.copy(transformer)
    # Without Transformer Engine upstream's grouped experts are a class that it no longer maintains.
    own.moe_grouped_gemm = HAVE_TE
    block = get_gpt_decoder_block_spec(own, use_transformer_engine=HAVE_TE, normalization=own.normalization)
    gpt = assemble(model, own, block)
    initialize_weights(gpt, own, seed)
    layers = [module for module in gpt.modules() if isinstance(module, MoELayer)]
    for bank, layer in enumerate(layers):
        initialize_experts(layer.experts, own, seed=seed, bank=bank, first_expert=layer.local_expert_indices[0])
    return gpt


def _contender(name: str, engine: TiedMoEEngine, job: Job) -> Contender:
    phases = Phases()
    engine.time_reduction = lambda: phases.phase("reduce")
    objective = LossFunction(device())
    return Contender(name, engine, objective, phases, reductions=reductions_of(engine))


def reductions_of(engine: TiedMoEEngine) -> int:
    """How often a step reduces each gradient: stages 2 and 3 keep partitions, so after every micro-batch."""
    return engine.gradient_accumulation_steps() if engine.zero_optimization_stage() >= 2 else 1
