"""What is logged of routing and banks is what a count of all decisions, token by token, gives: at any parallelism."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_moe_layer_wise_logging_tracker

from megatron_tied import TieConfig
from megatron_tied.layers.moe_layer import tied_layers
from tests.distributed.launch import launch
from tests.distributed.training_run import ROUTING_FIELDS
from tests.monitor import brute_force
from tests.monitor.brute_force import Layer
from tests.tiny_model import build, loss

BANKS = [0, 1, 1, 1, 2]
TOP_K = ROUTING_FIELDS["moe_router_topk"]
HIDDEN = ROUTING_FIELDS["hidden_size"]
LENGTH, MICRO_BATCH, SEQUENCES = 16, 2, 8
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SIGMOID = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.0,
}
CAPACITY = {"moe_expert_capacity_factor": 1.0}
PAD = {**CAPACITY, "moe_pad_expert_input_to_capacity": True}
TP = {"expert_model_parallel_size": 1, "tensor_model_parallel_size": 2}
TP_EP = {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2}
FP16 = {"fp16": {"loss_scale": 128}}


def config(
    ep: int,
    stage: int = 1,
    *,
    parallel: dict[str, int] | None = None,
    tie: Any = None,
    deepspeed: Any = None,
    **model: Any,
) -> dict[str, Any]:
    """A run in which every step is observed and examined."""
    return {
        "model": ROUTING_FIELDS | model,
        "tie": {"banks": BANKS, **(tie or {})},
        "parallel": parallel or {"expert_model_parallel_size": ep},
        "data": {"train": "nothing is read"},
        "train": {
            "run_dir": "nothing is written",
            "precision": "fp16" if deepspeed else "fp32",
            "seq_length": LENGTH,
            "micro_batch_size": MICRO_BATCH,
            "global_batch_size": SEQUENCES,
            "steps": 2,
        },
        "optimizer": {"lr": 1e-3, "clip_grad": 0.5},
        "monitor": {"every": 1, "expensive_every": 1},
        "deepspeed": {"zero_optimization": {"stage": stage}, **(deepspeed or {})},
    }


# World -> name -> run. The global batch is 4 micro-batches everywhere: 4, 2 or 1 of them a rank.
CASES: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "ep 1": config(1),
        "ep 1, ZeRO 0": config(1, 0),
        "ep 1, full recompute": config(1, **FULL),
    },
    2: {
        **{f"ep 2, ZeRO {stage}": config(2, stage) for stage in range(4)},
        "ep 1 of 2": config(1, 2),
        "ep 2, full recompute": config(2, 3, **FULL),
        "ep 2, moe recompute": config(2, recompute_granularity="selective", recompute_modules=["moe"]),
        "ep 2, capacity": config(2, **CAPACITY),
        "ep 2, padded capacity": config(2, **PAD),
        "ep 2, sigmoid": config(2, **SIGMOID),
        "ep 2, wider banks": config(2, tie={"num_tied_experts": 16}),
        "ep 2, sequential experts": config(2, expert_backend="sequential"),
        "tp 2": config(1, parallel=TP),
        "tp 2, ZeRO 0": config(1, 0, parallel=TP),
        "ep 2, fp16": config(2, 2, deepspeed=FP16),
    },
    4: {
        "ep 4": config(4),
        "ep 2 of 4": config(2),
        "ep 2, tp 2": config(2, parallel=TP_EP),
    },
}
NAMES = [(world, name) for world, cases in CASES.items() for name in cases]
# What follows from the routing alone, and so does not depend on how it is spread over ranks.
SAME_AS_ONE_RANK = [
    *("ep 1, ZeRO 0", "ep 1, full recompute", "ep 1 of 2", "ep 2, full recompute", "ep 2, moe recompute"),
    *(f"ep 2, ZeRO {stage}" for stage in range(4)),
    *("ep 4", "ep 2 of 4"),
]

Results = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    generator = torch.Generator().manual_seed(0)
    batches = torch.randint(0, ROUTING_FIELDS["vocab_size"], (2, SEQUENCES, LENGTH + 1), generator=generator)
    found: Results = {}
    for world, cases in CASES.items():
        directory = tmp_path_factory.mktemp(f"world_{world}")
        torch.save({"cases": cases, "batches": batches}, directory / "job")
        launch("tests.distributed.monitor_worker", world, str(directory / "job"), str(directory / "result"))
        found |= torch.load(Path(directory / "result"), weights_only=False)
    return found


def layers_of(step: dict[str, Any], model: dict[str, Any]) -> list[Layer]:
    return [Layer(step["decisions"], layer, model, TOP_K) for layer in range(len(BANKS))]


def users(bank: int) -> list[int]:
    return [layer for layer, at in enumerate(BANKS) if at == bank]


@pytest.mark.parametrize(("world", "name"), NAMES)
def test_routing_figures(world: int, name: str, results: Results) -> None:
    case = CASES[world][name]
    ep = case["parallel"]["expert_model_parallel_size"]
    for step in results[name]:
        metrics, layers = step["metrics"], layers_of(step, case["model"])
        assert sum(len(layer.logits) for layer in layers) == len(BANKS) * SEQUENCES * LENGTH, "each forward once"
        for index, layer in enumerate(layers):
            expected = brute_force.figures(layer, TOP_K) | {"ep_busiest": brute_force.busiest(layer, ep)}
            found = {figure: metrics[f"layer_{figure}/{index:02d}"] for figure in expected}
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-7), f"layer {index}"
        for bank in sorted(set(BANKS)):
            expected = brute_force.figures(brute_force.pooled([layers[at] for at in users(bank)]), TOP_K)
            found = {figure: metrics[f"bank_{figure}/{bank:02d}"] for figure in expected}
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-7), f"bank {bank}"


@pytest.mark.parametrize(("world", "name"), NAMES)
def test_agreement(world: int, name: str, results: Results) -> None:
    for step in results[name]:
        group = [layers_of(step, CASES[world][name]["model"])[at] for at in users(1)]
        expected = brute_force.agreement(group, TOP_K)
        found = {form: step["metrics"][f"agreement_{form}/01"] for form in expected}
        assert found == pytest.approx(expected, rel=1e-6)
        experts = group[0].experts
        assert step["metrics"]["agreement_overlap_chance/01"] == TOP_K / experts
        assert not [key for key in step["metrics"] if key.startswith("agreement_") and not key.endswith("/01")]


@pytest.mark.parametrize(("world", "name"), NAMES)
def test_over_all_layers(world: int, name: str, results: Results) -> None:
    for step in results[name]:
        metrics = step["metrics"]

        def of(figure: str, metrics: dict[str, float] = metrics) -> list[float]:
            return [metrics[f"layer_{figure}/{layer:02d}"] for layer in range(len(BANKS))]

        for figure in ("max_vio", "balance_loss", "token_entropy", "mean_entropy", "z_loss", "dropped", "ep_busiest"):
            assert metrics[f"routing/{figure}"] == pytest.approx(sum(of(figure)) / len(BANKS)), figure
        assert metrics["routing/max_vio_worst"] == max(of("max_vio"))
        assert metrics["routing/max_logit"] == max(of("max_logit"))
        assert metrics["routing/ep_busiest_worst"] == max(of("ep_busiest"))


@pytest.mark.parametrize(("world", "name"), NAMES)
def test_tables(world: int, name: str, results: Results) -> None:
    for step in results[name]:
        layers, tables = layers_of(step, CASES[world][name]["model"]), step["tables"]
        for index, layer in enumerate(layers):
            counts = layer.chosen.sum(0)
            assert tables["expert_load"][str(index)] == pytest.approx(list(counts / counts.mean()), abs=1e-5)
        group = [layers[at] for at in users(1)]
        assert tables["agreement"].keys() == {"1"}
        for i, first in enumerate(group):
            for j, second in enumerate(group):
                overlap = (first.chosen & second.chosen).sum(1).mean() / TOP_K
                assert tables["agreement"]["1"][i][j] == pytest.approx(overlap, abs=1e-5)
        pooled = sum(layer.chosen.sum(0) for layer in group)
        assert tables["bank_load"]["1"] == pytest.approx(list(pooled / pooled.mean()), abs=1e-5)


@pytest.mark.parametrize("name", SAME_AS_ONE_RANK)
def test_parallelism_accumulation_and_recompute_change_nothing(name: str, results: Results) -> None:
    for step, expected in zip(results[name], results["ep 1"], strict=True):
        here = {key: value for key, value in step["metrics"].items() if "busiest" not in key and "all_to" not in key}
        there = {key: expected["metrics"][key] for key in here}
        assert here == pytest.approx(there, rel=1e-4, abs=1e-6)
        assert here.keys() == {key for key in expected["metrics"] if "busiest" not in key}


@pytest.mark.parametrize(("world", "name"), NAMES)
def test_bank_norms(world: int, name: str, results: Results) -> None:
    for step in results[name]:
        metrics = step["metrics"]
        for bank in sorted(set(BANKS)):
            owner = users(bank)[0]
            weight, gradient = (brute_force.bank_norm(step[key], owner) for key in ("after", "gradients"))
            gradient /= step["scale"]
            changes = {key: value - step["before"][key] for key, value in step["after"].items()}
            update = brute_force.bank_norm(changes, owner)
            assert weight > 0
            assert gradient > 0
            found = [metrics[f"bank_{figure}_norm/{bank:02d}"] for figure in ("weight", "gradient", "update")]
            # Half precision weights are roundings of those that the optimizer has, and their change is small.
            rel = 1e-6 if name != "ep 2, fp16" else 1e-2
            assert found[:2] == pytest.approx([weight, gradient], rel=rel)
            rel = 1e-6 if name != "ep 2, fp16" else 2e-2
            assert found[2] == pytest.approx(update, rel=rel)
            assert metrics[f"bank_update_ratio/{bank:02d}"] == pytest.approx(update / weight, rel=rel)


@pytest.mark.parametrize(("world", "name"), NAMES)
def test_bank_gradients_are_parts_of_the_gradient_norm_before_clipping(world: int, name: str, results: Results) -> None:
    for step in results[name]:
        squares = sum(step["metrics"][f"bank_gradient_norm/{bank:02d}"] ** 2 for bank in set(BANKS))
        others = [value / step["scale"] for key, value in step["gradients"].items() if ".experts." not in key]
        squares += sum(value.double().square().sum().item() for value in others)
        assert math.sqrt(squares) == pytest.approx(step["grad_norm"], rel=1e-5)


def untied_gradients(
    weights: dict[str, torch.Tensor], batch: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> dict[int, torch.Tensor]:
    """What each layer adds to the gradient of its bank, flat, by plain autograd on a model that ties nothing."""
    model = build(TieConfig(), **ROUTING_FIELDS)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in own.items():
            layer = int(name.split(".")[2]) if ".mlp.experts." in name else 0
            source = name.replace(f"layers.{layer}.", f"layers.{BANKS.index(BANKS[layer])}.", 1)
            parameter.copy_(weights[source if ".mlp.experts." in name else name])
    micro_batches = batch.split(MICRO_BATCH)
    get_moe_layer_wise_logging_tracker().clear()
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", torch.tensor(1 / len(micro_batches)))
    mask = torch.ones(LENGTH, LENGTH).triu(1).bool()[None, None]
    for rows in micro_batches:
        tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        inputs = tokens, torch.arange(LENGTH).expand_as(tokens), mask, labels
        (loss(model, inputs) / len(micro_batches)).backward()
    # It keeps the depth of the first model of a process.
    get_moe_layer_wise_logging_tracker().clear()
    return {
        layer.layer_index: torch.cat([weight.grad.flatten() for weight in layer.experts.parameters()])
        for layer in tied_layers(model)
    }


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", ["ep 1", *SAME_AS_ONE_RANK])
def test_use_site_gradients(name: str, results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = torch.randint(
        0, ROUTING_FIELDS["vocab_size"], (2, SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(0)
    )[0]
    step = results[name][0]
    of_layers = untied_gradients(step["before"], batch, monkeypatch)
    gradients = [of_layers[layer].double() for layer in users(1)]
    cosines = [
        torch.dot(a, b).item() / (a.norm() * b.norm()).item() for i, a in enumerate(gradients) for b in gradients[:i]
    ]
    total, norms = sum(gradients), [gradient.norm().item() for gradient in gradients]
    assert step["metrics"]["bank_gradient_norm/01"] == pytest.approx(total.norm().item(), rel=1e-5)
    assert step["metrics"]["bank_gradient_cosine/01"] == pytest.approx(sum(cosines) / 3, rel=1e-5, abs=1e-6)
    assert step["metrics"]["bank_gradient_cosine_min/01"] == pytest.approx(min(cosines), rel=1e-5, abs=1e-6)
    cancellation = 1 - total.norm().item() / sum(norms)
    assert step["metrics"]["bank_gradient_cancellation/01"] == pytest.approx(cancellation, rel=1e-5)


def test_use_sites_are_not_told_apart_where_autograd_sums(results: Results) -> None:
    metrics = results["ep 2, sequential experts"][0]["metrics"]
    assert "bank_gradient_norm/01" in metrics
    assert not [key for key in metrics if "cosine" in key or "cancellation" in key]


@pytest.mark.parametrize(
    ("name", "passes"), [("ep 2, ZeRO 1", 2), ("ep 2, full recompute", 3), ("ep 4", 2), ("ep 2 of 4", 2)]
)
def test_all_to_all(name: str, passes: int, results: Results) -> None:
    world, ep = next((world, case["parallel"]["expert_model_parallel_size"]) for world, case in named(name))
    for step in results[name]:
        rows = sum(brute_force.rows_to_other_ranks(layer, ep) for layer in layers_of(step, {}))
        # Out and back in float32, and one routing probability; in each pass.
        expected = passes * rows * (2 * HIDDEN + 1) * 4 / world / 1e9
        assert step["metrics"]["all_to_all/gb"] == pytest.approx(expected, rel=1e-9)
        assert 0 < step["metrics"]["all_to_all/seconds"] < 60


def named(name: str) -> list[tuple[int, dict[str, Any]]]:
    return [(world, cases[name]) for world, cases in CASES.items() if name in cases]


def test_without_expert_parallelism_there_is_no_all_to_all(results: Results) -> None:
    assert not [key for key in results["ep 1 of 2"][0]["metrics"] if "all_to_all" in key]


def test_something_was_dropped(results: Results) -> None:
    for name in ("ep 2, capacity", "ep 2, padded capacity"):
        assert 0.05 < results[name][0]["metrics"]["routing/dropped"] < 0.6


@pytest.mark.parametrize(("world", "name"), NAMES)
def test_every_phase_takes_time(world: int, name: str, results: Results) -> None:
    for step in results[name]:
        for phase in ("data", "forward", "backward", "reduce", "optimizer"):
            assert 0 < step["time"][f"time/{phase}"] < 600, phase
