"""Every run of "Tying the Loop" (arXiv:2606.16825) as one description, from which configs/ is written:

    python examples/paper/description.py

`main` are the rows of its main tables, `ablation` is the grid that asks which parts of a layer can be tied, `miniature`
is what two CPU cores can do of the first. What a row does not name is what megatron-tied has as default.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

CONFIGS = Path(__file__).parent / "configs"
RUNS = "runs/paper"

Row = Mapping[str, Mapping[str, Any]]

ARCHITECTURES = {"olmoe": 64, "deepseek": 64, "qwen3_moe": 60}  # experts of an untied layer
LAYERS = {"olmoe": 16, "deepseek": 16, "qwen3_moe": 28}
SCALES = {"regular": 30_000, "small": 20_000, "tiny": 20_000}  # steps
# Of the tie section, given the experts of an untied layer. narrow: untied, with as many parameters as g4.
VARIANTS = {
    "g1": lambda experts: {"group_size": 1},
    "g2": lambda experts: {"group_size": 2},
    "g4": lambda experts: {"group_size": 4},
    "g4-w2x": lambda experts: {"group_size": 4, "num_tied_experts": 2 * experts},
    "g4-w4x": lambda experts: {"group_size": 4, "num_tied_experts": 4 * experts},
    "narrow": lambda experts: {"group_size": 1, "num_tied_experts": experts // 4},
}

# Layers per loop and loops of every group between the two untied layers at either end, which `moeut` lacks.
TOPOLOGIES: Mapping[str, Sequence[tuple[int, int]]] = {
    "moeut": [(2, 16)],
    "1group": [(2, 14)],
    "2groups": [(2, 7)] * 2,
    "3groups": [(2, 5), (2, 4), (2, 5)],
    "4groups": [(1, 7)] * 4,
    "7groups": [(1, 4)] * 7,
}
SHARES = ("experts", "experts_attention", "all")
GRANULARITIES = {
    "fine": {"num_moe_experts": 32, "moe_router_topk": 8, "moe_ffn_hidden_size": 256},
    "coarse": {"num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 1024},
    # One expert that gets every token: as wide as what a token gets of the others.
    "dense": {"num_moe_experts": 1, "moe_router_topk": 1, "moe_ffn_hidden_size": 2048, "moe_router_pre_softmax": True},
}


def grids() -> dict[str, dict[str, Row]]:
    """The sections of every config by its name, by grid."""
    return {"main": dict(_main()), "ablation": dict(_ablation()), "miniature": dict(_miniature())}


def _main() -> Iterator[tuple[str, Row]]:
    for architecture, experts in ARCHITECTURES.items():
        for scale, steps in SCALES.items():
            for variant, tie in VARIANTS.items():
                name = f"{architecture}-{scale}-{variant}"
                model = {"preset": architecture, "scale": scale, **_of_every_model(LAYERS[architecture])}
                if architecture == "qwen3_moe":
                    model["rotary_base"] = 10_000
                train = {"steps": steps, "seq_length": 2048, "global_batch_size": 256, "eval_every": 500}
                size = {"micro_batch_size": 4 if scale == "regular" else 16}
                yield name, _row(name, model, tie(experts), train | size, optimizer={})


def _ablation() -> Iterator[tuple[str, Row]]:
    for granularity in ("fine", "coarse"):
        yield _ablation_row(granularity, "untied", {"group_size": 1})
        for topology, groups in TOPOLOGIES.items():
            # Without untied layers at its ends, no row of the paper ties experts alone.
            for share in SHARES[topology == "moeut" :]:
                yield _ablation_row(granularity, f"{topology}-{share}", {"banks": _banks(groups), "share": share})
    for divisor in ("none", "linear"):
        for share in SHARES:
            tie = {"banks": _banks(TOPOLOGIES["4groups"]), "share": share, "lr_divisor": divisor}
            yield _ablation_row("fine", f"4groups-{share}-lr_{divisor}", tie)
    yield _ablation_row("dense", "untied", {"group_size": 1})


def _ablation_row(granularity: str, variant: str, tie: Mapping[str, Any]) -> tuple[str, Row]:
    name = f"{granularity}-{variant}"
    model = {
        "num_layers": 32,
        "hidden_size": 512,
        "num_attention_heads": 8,
        **GRANULARITIES[granularity],
        "qk_layernorm": True,
        "layernorm_epsilon": 1e-6,
        "vocab_size": 100_277,
        "share_embeddings_and_output_weights": True,
        **_of_every_model(32),
    }
    if granularity == "dense":
        model |= {"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 0.0}
    train = {"steps": 10_000, "seq_length": 512, "global_batch_size": 256, "micro_batch_size": 32, "eval_every": 500}
    return name, _row(name, model, tie, train, optimizer={"warmup_steps": 50, "adamw_weight_decay": 0.0})


def _banks(groups: Sequence[tuple[int, int]]) -> list[int]:
    """The bank of each of 32 layers: a group's layers in turns, as often as it loops."""
    banks: list[int] = []
    untied = (32 - sum(layers * loops for layers, loops in groups)) // 2
    for layers, loops in [(untied, 1), *groups, (untied, 1)]:
        first = max(banks, default=-1) + 1
        banks += [*range(first, first + layers)] * loops
    return banks


def _miniature() -> Iterator[tuple[str, Row]]:
    model = {
        "preset": "olmoe",
        "scale": "tiny",
        "num_layers": 12,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_query_groups": 4,
        "num_moe_experts": 32,
        "moe_router_topk": 4,
        "moe_ffn_hidden_size": 64,
        "vocab_size": 4096,
        **_of_every_model(12),
    }
    train = {"steps": 300, "seq_length": 256, "micro_batch_size": 8, "global_batch_size": 8, "precision": "fp32"}
    for variant, tie in VARIANTS.items():
        evaluation = {"eval_every": 100, "eval_steps": 40}
        sections = _row(variant, model, tie(32), train | evaluation, optimizer={"warmup_steps": 30})
        stdlib = "runs/quickstart/data/stdlib"
        data = {"train": stdlib, "split": [0.95, 0.05], "tokenizer": f"{stdlib}.model", "num_workers": 0}
        yield variant, {**sections, "data": data, "checkpoint": {"save_every": 100, "keep_last": 1}}


def _of_every_model(layers: int) -> dict[str, Any]:
    # The paper's code takes the mean of each router loss over the layers, Megatron-Core the sum.
    losses = {"moe_aux_loss_coeff": 1e-2 / layers, "moe_z_loss_coeff": 1e-4 / layers}
    return {"init_method": "depth_scaled_xavier", **losses}


def _row(name: str, model: Row, tie: Row, train: Row, optimizer: Row) -> Row:
    domains = {0.75: "data/paper/dclm-edu", 0.25: "data/paper/finephrase"}  # of data/prepare.sh
    return {
        "model": model,
        "tie": tie,
        "data": {
            "train": [part for weight, prefix in domains.items() for part in (weight, f"{prefix}-train")],
            "validation": [part for weight, prefix in domains.items() for part in (weight, f"{prefix}-held-out")],
            "tokenizer": "tiktoken:cl100k_base",
        },
        "train": {"run_dir": f"{RUNS}/{name}", **train},
        "optimizer": {"preset": "tying_the_loop", **optimizer},
    }


def main() -> None:
    """Write configs/ anew."""
    shutil.rmtree(CONFIGS, ignore_errors=True)
    for grid, rows in grids().items():
        (CONFIGS / grid).mkdir(parents=True)
        for name, sections in rows.items():
            (CONFIGS / grid / f"{name}.yaml").write_text(as_text(sections), encoding="utf-8")


def as_text(sections: Row) -> str:
    """A config file's text."""
    return "# Written by examples/paper/description.py.\n" + OmegaConf.to_yaml(OmegaConf.create(sections))


if __name__ == "__main__":
    main()
