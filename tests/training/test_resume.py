"""A run that is gone on with is the run that was never interrupted: bit for bit, or to rounding on other ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from megatron_tied import ConfigError, build_gpt_model
from megatron_tied.checkpoint.layout import model_layout
from megatron_tied.checkpoint.loader import load_weights, verified
from megatron_tied.checkpoint.manifest import Manifest
from megatron_tied.checkpoint.storage import tensor_key
from megatron_tied.checkpoint.weights import WeightReader
from megatron_tied.convert.sources import CheckpointSource
from megatron_tied.training.config_file import parse_config
from tests.distributed.launch import launch
from tests.training.runs import Corpus, config_values, read_metrics

STEPS, HALF = 8, 4
EP, STAGE = "parallel.expert_model_parallel_size", "deepspeed.zero_optimization.stage"
TP = "parallel.tensor_model_parallel_size"
OFFLOAD = "deepspeed.zero_optimization.offload_optimizer.device=cpu"
OFFLOAD_3 = "deepspeed.zero_optimization.offload_param.device=cpu"
METRICS = ("loss", "lm_loss", "aux_loss", "z_loss", "grad_norm", "lr")
OBSERVED = ("routing/", "layer_", "bank_", "agreement_")

# A loss scale that grows on the way.
SCALED = ["deepspeed.fp16.initial_scale_power=8", "deepspeed.fp16.loss_scale_window=3"]
# On two processes, EP 2, two micro-batches a step: what the straight run is started with, and the run from its middle.
BITWISE = {
    "zero0": [f"{STAGE}=0"],
    "zero1": [f"{STAGE}=1"],
    "zero2": [f"{STAGE}=2", "checkpoint.async_save=false"],
    "zero3": [f"{STAGE}=3"],
    "bf16": [f"{STAGE}=2", "train.precision=bf16"],
    "fp16": [f"{STAGE}=1", "train.precision=fp16", *SCALED],
    "dropout": [f"{STAGE}=1", "model.hidden_dropout=0.1", "model.attention_dropout=0.1"],
    "expert bias": [
        *("model.moe_router_score_function=sigmoid", "model.moe_router_enable_expert_bias=true"),
        *("model.moe_router_load_balancing_type=none", "model.moe_aux_loss_coeff=0.0"),
    ],
    "offload": [f"{STAGE}=2", OFFLOAD],
    "tp2, ep2": [f"{TP}=2", f"{STAGE}=3"],
}
FROZEN = "optimizer.freeze=[norms]"
MUON = ["optimizer.name=muon", "optimizer.lr=0.01", "optimizer.iterate_in=fp32"]
LATENT = [
    *("model.multi_latent_attention=true", "model.q_lora_rank=16", "model.kv_lora_rank=16", "model.qk_head_dim=8"),
    *("model.qk_pos_emb_head_dim=4", "model.v_head_dim=12", "model.qk_layernorm=true", "model.rope_type=rope"),
    # A norm over so few numbers, some of them all near 0, would make third digits of last bits.
    "model.layernorm_epsilon=0.01",
    *("model.recompute_granularity=selective", "model.recompute_modules=[mla_up_proj]"),
]
WITH_FROZEN = {
    "frozen, zero0": [FROZEN, f"{STAGE}=0"],
    "frozen, zero2": [FROZEN, f"{STAGE}=2"],
    "frozen, zero3, bf16, tp2": [FROZEN, f"{STAGE}=3", f"{TP}=2", "train.precision=bf16"],
}
BITWISE |= {**WITH_FROZEN, "latent": [*LATENT, f"{STAGE}=3"]}
BITWISE |= {"muon, zero2": [*MUON, f"{STAGE}=2"], "muon, zero3, bf16": [*MUON, f"{STAGE}=3", "train.precision=bf16"]}
SHARED = ["tie.share=all", *MUON]
BITWISE |= {"shared, zero2": [*SHARED, f"{STAGE}=2"], "shared, zero3": ["tie.share=experts_attention", f"{STAGE}=3"]}
NO_BIAS_UPDATE = ["train.steps=1", "optimizer.warmup_steps=0", "model.moe_router_bias_update_rate=0"]
# From the checkpoint of "zero1" on two processes.
ON_TWO = {
    "to zero3": [f"{STAGE}=3"],
    "to zero0": [f"{STAGE}=0"],
    "to ep1": [f"{EP}=1", f"{STAGE}=2"],
    "to tp2, zero3": [f"{TP}=2", f"{STAGE}=3"],
    "to sequential experts": ["model.expert_backend=sequential", f"{STAGE}=3"],
    "to offload": [f"{STAGE}=3", OFFLOAD, OFFLOAD_3],
    "to recompute": ["model.recompute_granularity=selective", "model.recompute_modules=[moe]"],
}
# From another checkpoint on two processes: (origin, name) -> overrides.
ON_TWO_FROM = {
    ("frozen, zero2", "frozen, to zero3, tp2"): [FROZEN, f"{STAGE}=3", f"{TP}=2"],
    ("muon, zero2", "muon, to zero3, ep1"): [*MUON, f"{STAGE}=3", f"{EP}=1"],
    ("muon, zero2", "muon, to offload"): [*MUON, f"{STAGE}=2", OFFLOAD],
    ("shared, zero2", "shared, to zero3, ep1"): [*SHARED, f"{STAGE}=3", f"{EP}=1"],
    ("latent", "latent, to zero1, tp2, ep1"): [*LATENT, f"{STAGE}=1", f"{TP}=2", f"{EP}=1"],
}
# From a checkpoint written by (world 4, EP 2, ZeRO 2): world -> name -> how it is gone on with there.
ANY_TO_ANY = {
    4: {"4, 4, zero1": [f"{EP}=4", f"{STAGE}=1"]},
    2: {"2, 2, zero3": [f"{EP}=2", f"{STAGE}=3"], "2, 1, zero1": [f"{EP}=1", f"{STAGE}=1"]},
    1: {"1, 1, zero0": [f"{EP}=1", f"{STAGE}=0"]},
}


class Runs:
    """Runs by name, in directories of their own."""

    def __init__(self, directory: Path, corpus: Corpus):
        self.directory = directory
        values = config_values(corpus, directory / "unused")
        # A blend, two micro-batches a step on two processes, every step logged.
        values["data"]["train"] = [0.75, str(corpus.a), 0.25, str(corpus.b)]
        values["train"] |= {"steps": STEPS, "log_every": 1, "eval_every": 0}
        # Within a window's length of the end, so that dead experts depend on what was seen before a restart.
        values["monitor"] = {"every": 2, "expensive_every": 4, "dead_window": 6, "tensorboard": False}
        self._config = directory / "config.yaml"
        self._config.write_text(json.dumps(values))

    def start(self, world: int, runs: dict[str, list[str]]) -> None:
        """Train all of them, one after the other, on `world` processes."""
        commands = {str(self.directory / name): overrides for name, overrides in runs.items()}
        launch("tests.training.many_runs", world, str(self._config), json.dumps(commands))

    def checkpoint(self, name: str, step: int) -> Path:
        return self.directory / name / "checkpoints" / f"step_{step:08d}"

    def resume(self, name: str) -> str:
        """The override that goes on from the middle of the run `name`."""
        return f"train.resume={self.checkpoint(name, HALF)}"

    def steps(self, name: str) -> dict[int, dict[str, float]]:
        """The losses of every step."""
        lines = {line["step"]: line for line in read_metrics(self.directory / name) if "loss" in line}
        return {step: {metric: line[metric] for metric in METRICS} for step, line in lines.items()}

    def observed(self, name: str) -> dict[int, dict[str, float]]:
        """What was seen of routing and banks, by step."""
        lines = {line["step"]: line for line in read_metrics(self.directory / name) if "routing/max_vio" in line}
        return {
            step: {metric: line[metric] for metric in line if metric.startswith(OBSERVED)}
            for step, line in lines.items()
        }


SAVE = f"checkpoint.save_every={HALF}"


@pytest.fixture(scope="module")
def runs(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    made = Runs(tmp_path_factory.mktemp("resume"), corpus)
    straight = {name: [*overrides, SAVE] for name, overrides in BITWISE.items()}
    resumed = {f"{name} resumed": [*overrides, made.resume(name)] for name, overrides in BITWISE.items()}
    moved = {name: [*overrides, made.resume("zero1")] for name, overrides in ON_TWO.items()}
    moved |= {name: [*overrides, made.resume(origin)] for (origin, name), overrides in ON_TWO_FROM.items()}
    weights = {
        "weights only": [
            f"train.init_from={made.checkpoint('zero1', STEPS)}",
            "train.steps=2",
            "optimizer.warmup_steps=1",
        ]
    }
    biased = [*BITWISE["expert bias"], f"train.init_from={made.checkpoint('expert bias', STEPS)}"]
    weights["weights with bias"] = [*biased, *NO_BIAS_UPDATE, "checkpoint.save_every=1"]
    made.start(2, straight | resumed | moved | weights)
    made.start(4, {"4, 2, zero2": [f"{EP}=2", f"{STAGE}=2", SAVE], "to 4, 4": [f"{EP}=4", made.resume("zero1")]})
    for world, cases in ANY_TO_ANY.items():
        made.start(world, {name: [*overrides, made.resume("4, 2, zero2")] for name, overrides in cases.items()})
    return made


def after(steps: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    return {step: metrics for step, metrics in steps.items() if step > HALF}


@pytest.mark.parametrize("name", BITWISE)
def test_four_and_four_steps_are_eight_bit_for_bit(runs: Runs, name: str) -> None:
    expected, found = runs.steps(name), runs.steps(f"{name} resumed")
    assert found == after(expected)
    assert len(found) == HALF
    observed = runs.observed(f"{name} resumed")
    assert observed == after(runs.observed(name))
    assert list(observed) == [6, 8]
    assert any(metric.startswith("bank_update_ratio") for metric in observed[8])


def moved() -> list[tuple[str, str]]:
    cases = [*(("zero1", name) for name in [*ON_TWO, "to 4, 4"]), *ON_TWO_FROM]
    return cases + [("4, 2, zero2", name) for of_world in ANY_TO_ANY.values() for name in of_world]


@pytest.mark.parametrize(("origin", "name"), moved())
def test_any_topology_goes_on_from_any(runs: Runs, origin: str, name: str) -> None:
    expected, found = after(runs.steps(origin)), runs.steps(name)
    assert found.keys() == expected.keys()
    for step, metrics in expected.items():
        assert found[step] == pytest.approx(metrics, rel=1e-5), step


def test_weights_only_begin_a_new_run_where_the_other_ended(runs: Runs) -> None:
    first, last = runs.steps("weights only")[1], runs.steps("zero1")[STEPS]
    untrained = runs.steps("zero1")[1]
    # On other samples, before the first update.
    assert abs(first["lm_loss"] - last["lm_loss"]) < 0.2 * (untrained["lm_loss"] - last["lm_loss"])


def test_the_biases_of_experts_go_with_the_weights(runs: Runs) -> None:
    expected, found = (
        {name: tensor for name, tensor in _buffers(runs.checkpoint(run, step)) if name.endswith("expert_bias")}
        for run, step in (("expert bias", STEPS), ("weights with bias", 1))
    )
    assert len(expected) == len(found) == 5
    for name, bias in expected.items():
        assert bias.abs().max() > 0
        assert torch.equal(found[name], bias), name


def _buffers(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in Manifest.read(checkpoint).tensors.items():
        if name.startswith("buffer/"):
            (chunk,) = tensor.chunks
            with safe_open(checkpoint / chunk.file, "pt") as file:
                yield name, file.get_tensor(tensor_key(name, chunk.offsets))


def test_the_loss_scale_goes_on(runs: Runs) -> None:
    straight, resumed = (
        {line["step"]: line["loss_scale"] for line in read_metrics(runs.directory / name) if "loss_scale" in line}
        for name in ("fp16", "fp16 resumed")
    )
    assert len(set(straight.values())) > 1
    assert straight[HALF + 1] != straight[1]
    assert resumed == {step: scale for step, scale in straight.items() if step > HALF}


def test_a_checkpoint_holds_each_parameter_once(runs: Runs) -> None:
    for name, world in (("zero1", 2), ("4, 2, zero2", 4), ("shared, zero3", 2)):
        parameters = json.loads((runs.directory / name / "summary.json").read_text())["parameters"]["unique"]
        directory = runs.checkpoint(name, STEPS)
        manifest = Manifest.read(directory)
        assert manifest.world_size == world
        elements = {}
        for tensor, entry in manifest.tensors.items():
            state = tensor.partition("/")[0]
            elements[state] = elements.get(state, 0) + math.prod(entry.shape)
        assert elements["weight"] == elements["exp_avg"] == elements["exp_avg_sq"] == parameters
        # What is not state: the random states, and the files' headers, which for so small a model weigh something.
        on_disk = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        assert on_disk == sum(file.bytes for file in manifest.files.values())
        headers = sum(_header_bytes(file) for file in directory.glob("*.safetensors"))
        assert on_disk - headers - elements["rng"] == pytest.approx(3 * 4 * parameters, rel=0.02)


def test_what_layers_share_beside_experts_is_not_converted(runs: Runs) -> None:
    with pytest.raises(ConfigError, match=r"tie\.share = 'all': cannot be converted"):
        CheckpointSource(runs.checkpoint("shared, zero2", STEPS))


@pytest.mark.parametrize("name", WITH_FROZEN)
def test_what_is_frozen_is_saved_once_as_it_was_and_without_states(runs: Runs, name: str) -> None:
    reader = WeightReader(runs.checkpoint(name, STEPS))
    tensors = reader.manifest.tensors
    norms = {name for name in reader.shapes() if "layernorm" in name}
    assert len(norms) == 11
    for name, weight in reader:
        assert (f"exp_avg/{name}" in tensors, f"exp_avg_sq/{name}" in tensors) == (name not in norms, name not in norms)
        assert torch.equal(weight, torch.ones_like(weight)) == (name in norms)
        chunks = tensors[f"weight/{name}"].chunks
        assert sum(math.prod(chunk.sizes) for chunk in chunks) == weight.numel()


@pytest.mark.usefixtures("one_process")
def test_weights_are_read_one_at_a_time_and_into_a_plain_model(runs: Runs) -> None:
    directory = runs.checkpoint("4, 2, zero2", STEPS)
    reader = WeightReader(directory)
    config = parse_config(reader.manifest.run)
    model = build_gpt_model(config.model, config.tie, seed=99)
    load_weights(model, verified(directory))
    parameters, seen = dict(model.named_parameters()), set()
    for name, parameter in model_layout(model).items():
        for block in parameter.blocks:
            place = tuple(slice(o, o + n) for o, n in zip(block.offsets, block.sizes, strict=True))
            stop = block.start + math.prod(block.sizes)
            found = parameters[name].detach().flatten()[block.start : stop]
            assert torch.equal(found.view(block.sizes), reader.read(block.tensor)[place]), block
            seen.add(block.tensor)
    assert {name for name, _ in reader} == seen == reader.shapes().keys()
    # Another run of the same training has other partitions and the same weights.
    other = WeightReader(runs.checkpoint("zero3", STEPS))
    for name, weight in reader:
        torch.testing.assert_close(other.read(name), weight, rtol=1e-3, atol=1e-5)


def _header_bytes(file: Path) -> int:
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def test_the_finished_run_says_so_and_keeps_its_figures(runs: Runs) -> None:
    before: dict[str, Any] = json.loads((runs.directory / "zero1" / "summary.json").read_text())
    runs.start(2, {"zero1": BITWISE["zero1"] + [SAVE]})
    again = json.loads((runs.directory / "zero1" / "summary.json").read_text())
    assert again | {"seconds": before["seconds"]} == before
    assert len(runs.steps("zero1")) == STEPS
