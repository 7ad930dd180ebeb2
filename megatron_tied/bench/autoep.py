"""DeepSpeed's AutoEP as a contender: the untied Hugging Face model, its experts spread over ranks by DeepSpeed."""

# ruff: noqa: E402  (DeepSpeed must be imported after the host is prepared: it looks for an accelerator)
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_tied.platform import prepare

prepare()

import deepspeed

from megatron_tied.bench.contender import Contender
from megatron_tied.bench.engines import reductions_of
from megatron_tied.bench.huggingface import TransformersLoss, copy_weights, transformers_model
from megatron_tied.bench.job import AUTOEP, Job
from megatron_tied.bench.phases import Phases


def build_autoep(job: Job) -> Contender:
    """From the weights of `untied`, in the same ZeRO stage and precision; expert parallel as the config says."""
    config = job.config_of(AUTOEP)
    model = transformers_model(config)
    copy_weights(config, model)
    settings = config.optimizer
    ds_config = config.deepspeed_config(job.ranks) | {
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": settings.lr,
                "betas": list(settings.betas),
                "eps": settings.eps,
                "weight_decay": settings.weight_decay,
                "torch_adam": True,
            },
        },
        "expert_parallel": {
            "enabled": True,
            "autoep_size": config.parallel.expert_model_parallel_size,
            "preset_model": model.config.model_type,
        },
    }
    with _registry_of_both():
        engine, *_ = deepspeed.initialize(model=model, config=ds_config)
    phases = Phases()
    return Contender(AUTOEP, engine, TransformersLoss(model.config), phases, reductions=reductions_of(engine))


@contextmanager
def _registry_of_both() -> Iterator[None]:
    """DeepSpeed 0.19 asks by name what transformers 5.24 lets be asked for by model only: it may do both."""
    from transformers.utils import output_capturing

    registry: Any = type(getattr(output_capturing, "_CAN_RECORD_REGISTRY", {}))
    own = registry.__dict__.get("get")
    if registry is dict or own is None:
        yield
        return

    def get(self: Any, key: Any, default: Any = None) -> Any:
        return dict.get(self, key, default) if isinstance(key, str) else own(self, key)

    registry.get = get
    try:
        yield
    finally:
        registry.get = own
