"""What a run of eight layers hands to its sinks, with made-up numbers: every metric and table there is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_tied.monitor.description import RunDescription
from megatron_tied.monitor.sinks import Sinks
from megatron_tied.topology import TieConfig, TieTopology

LAYERS, EXPERTS, TOP_K = 8, 16, 4
OBSERVED_EVERY, EXAMINED_EVERY = 10, 50
TOPOLOGY = TieTopology.build(TieConfig(group_size=2, skip_first=1, skip_last=1), LAYERS)  # 0 [1 2] [3 4] [5 6] 7
TIED = [bank for bank in TOPOLOGY.banks if bank.is_tied]

_FIGURES = (
    *("load_min", "load_max", "load_std", "load_p50", "load_p75", "load_p95"),
    *("max_vio", "balance_loss", "token_entropy", "mean_entropy", "dead_fraction", "max_logit", "z_loss", "dropped"),
)
_OF_MODEL = (
    *("max_vio", "max_vio_worst", "balance_loss", "token_entropy", "mean_entropy", "dead_fraction", "max_logit"),
    *("z_loss", "dropped", "ep_busiest", "ep_busiest_worst"),
)
_LOGGED = (
    *("perplexity", "aux_loss", "z_loss", "grad_norm", "loss_scale", "lr", "lr/dense", "lr/experts"),
    *("tokens", "tokens_per_second", "step_seconds", "eta_seconds"),
    *("memory_gb", "memory_allocated_gb", "memory_reserved_gb", "memory_fullest_gb", "states_gb"),
    *("planned_memory_gb", "planned_states_gb", "planned_tokens_per_second"),
    *("parameters_unique", "parameters_untied"),
    *(f"time/{part}" for part in ("data", "forward", "backward", "reduce", "optimizer", "other")),
)
_SCALE = {"dead_fraction": 0.05, "dropped": 0.02, "token_entropy": 0.6, "mean_entropy": 0.6, "max_logit": 8.0}


def describe(**changes: Mapping[str, Any]) -> RunDescription:
    """The run as its config has it; `changes` are sections, whose keys replace those of the config."""
    config: dict[str, dict[str, Any]] = {
        "model": {
            **{"preset": None, "num_layers": LAYERS, "hidden_size": 64, "num_moe_experts": EXPERTS},
            **{"moe_router_topk": TOP_K, "moe_aux_loss_coeff": 0.01},
        },
        "tie": {
            **{"group_size": 2, "pattern": "consecutive", "num_tied_experts": None, "lr_divisor": "sqrt"},
            "share": "all",
        },
        "parallel": {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 1},
        "train": {"precision": "bf16", "global_batch_size": 32, "seq_length": 1024, "steps": 400, "seed": 7},
        "optimizer": {"lr": 3e-4, "warmup_steps": 20},
        "deepspeed": {"zero_optimization": {"stage": 2}},
    }
    merged = {name: section | dict(changes.get(name, {})) for name, section in config.items()}
    return RunDescription(merged, TOPOLOGY, {"unique": 5_000_000, "untied": 8_000_000, "banks": 5}, world_size=2)


def logged(step: int) -> dict[str, float]:
    """A line of the log."""
    late = 1 - math.exp(-step / 100)
    loss = 8.3 - 5 * late
    values = {name: _around(name, step, 1 + late) for name in _LOGGED}
    return {**values, "lm_loss": loss, "loss": loss + 0.1, "perplexity": math.exp(loss), "lr": 3e-4 * (1.1 - late)}


def observed(step: int) -> dict[str, float]:
    """Routing of one step."""
    late = 1 - math.exp(-step / 100)
    names = [f"routing/{figure}" for figure in _OF_MODEL]
    names += [f"layer_{figure}/{layer:02d}" for figure in (*_FIGURES, "ep_busiest") for layer in range(LAYERS)]
    names += [f"bank_{figure}/{bank.index:02d}" for figure in _FIGURES for bank in TOPOLOGY.banks]
    values = {name: _around(name, step, _SCALE.get(_figure(name), 1.0) * (1 - 0.5 * late)) for name in names}
    for bank in TIED:
        for kind, chance in (("top1", 1 / EXPERTS), ("overlap", TOP_K / EXPERTS), ("distinct", 0.3)):
            values[f"agreement_{kind}/{bank.index:02d}"] = chance + 0.5 * late * bank.index / len(TIED)
            values[f"agreement_{kind}_chance/{bank.index:02d}"] = chance
    return values | {"all_to_all/gb": 0.25, "all_to_all/seconds": _around("all_to_all", step, 0.02)}


def examined(step: int) -> dict[str, float]:
    """Norms and gradients of the banks."""
    norms = ("weight_norm", "gradient_norm", "update_norm", "update_ratio")
    names = [f"bank_{name}/{bank.index:02d}" for name in norms for bank in TOPOLOGY.banks]
    of_uses = ("gradient_cosine", "gradient_cosine_min", "gradient_cancellation")
    names += [f"bank_{name}/{bank.index:02d}" for name in of_uses for bank in TIED]
    return {name: _around(name, step, 0.4) for name in names}


def tables(step: int) -> dict[str, dict[str, Any]]:
    """Loads, among them a dead expert of each layer from step 100 on, and agreement."""
    noise = np.random.default_rng(step)

    def load(index: int) -> list[float]:
        shares = noise.gamma(2.0, size=EXPERTS)
        if step >= 100:
            shares[index] = 0.0
        return [round(share, 5) for share in (shares / shares.mean()).tolist()]

    matrices = {f"{bank.index}": [[1.0, 0.2 + 0.2 * bank.index], [0.2 + 0.2 * bank.index, 1.0]] for bank in TIED}
    return {
        "expert_load": {f"{layer}": load(layer) for layer in range(LAYERS)},
        "bank_load": {f"{bank.index}": load(bank.index) for bank in TOPOLOGY.banks},
        "agreement": matrices,
    }


def write_steps(sinks: Sinks, steps: range) -> None:
    """What the training loop hands on in these steps."""
    for step in steps:
        metrics = logged(step) if step % 2 == 0 else {}
        metrics |= observed(step) if step % OBSERVED_EVERY == 0 else {}
        metrics |= examined(step) if step % EXAMINED_EVERY == 0 else {}
        if metrics:
            sinks.write(step, metrics)
        if step % EXAMINED_EVERY == 0:
            sinks.write_tables(step, tables(step))
            sinks.write(step, {"validation_loss": logged(step)["lm_loss"] + 0.05})


def metric_names() -> set[str]:
    """Every metric there is."""
    return {"validation_loss", *logged(1), *observed(1), *examined(1)}


def _figure(name: str) -> str:
    of_model, figure = name.split("/")
    return figure if of_model == "routing" else of_model.partition("_")[2]


def _around(name: str, step: int, value: float) -> float:
    """`value`, a little apart for every name, with noise."""
    return value * (1 + sum(map(ord, name)) % 13 / 20 + 0.02 * math.sin(step * len(name)))
