"""Learning from a teacher: the objective against plain PyTorch, and runs that recover a tied model."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_tied import TieConfig
from megatron_tied.checkpoint.manifest import Manifest
from megatron_tied.checkpoint.weights import WeightReader
from megatron_tied.layers.moe_layer import tied_layers
from megatron_tied.training.config import RunConfig
from megatron_tied.training.config_file import load_config, parse_config
from megatron_tied.training.distillation import Distillation
from megatron_tied.training.resume import choose_start
from tests.convert.hf_models import convert
from tests.distributed.launch import launch
from tests.engine.test_engine import FULL, selective, start
from tests.tiny_model import FIELDS, build, gradients, inputs
from tests.training.runs import Corpus, config_values, read_metrics, series

LENGTH = 8
NO_AUX = {"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 0.0}
KL, MOE_OUTPUT = 0.3, 0.7


def settings(**distill: float) -> RunConfig:
    return parse_config(
        {
            "model": FIELDS,
            "data": {"train": "unused"},
            "train": {"run_dir": "unused", "seq_length": LENGTH},
            "distill": {"teacher": "unused", "kl": KL, "moe_output": MOE_OUTPUT, **distill},
        }
    )


def teacher_model() -> GPTModel:
    """An untied one, with weights of its own."""
    return build(TieConfig(), seed=2, **NO_AUX).requires_grad_(False).eval()


def batch(seed: int = 0) -> dict[str, Tensor]:
    tokens, positions, _, labels = inputs(length=LENGTH, seed=seed)
    loss_mask = torch.ones(tokens.shape)
    loss_mask[0, seed % LENGTH] = 0.0
    return {"tokens": tokens, "labels": labels, "position_ids": positions, "loss_mask": loss_mask}


def with_layers(model: GPTModel, example: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The logits, and what the MoE layers give out."""
    outputs: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, args, output: outputs.append(output[0].clone()))
        for layer in tied_layers(model)
    ]
    mask = torch.ones(LENGTH, LENGTH).triu(1).bool()[None, None]
    logits = model(example["tokens"], example["position_ids"], mask)
    for hook in hooks:
        hook.remove()
    return logits, outputs


def plain_loss(student: GPTModel, teacher: GPTModel, example: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """By autograd alone, from formulas written out."""
    logits, own = with_layers(student, example)
    teacher_logits, taught = with_layers(teacher, example)
    counted = example["loss_mask"].bool()
    ce = cross_entropy(logits[counted], example["labels"][counted])
    p, q = teacher_logits[counted].softmax(-1), logits[counted].softmax(-1)
    kl = (p * (p.log() - q.log())).sum(-1).mean()
    assert len(own) == len(taught) == 6
    apart = sum(((a - b) ** 2).mean() / (b**2).mean() for a, b in zip(own, taught, strict=True)) / 6
    parts = {"lm_loss": ce.item(), "distill_kl": kl.item(), "distill_moe_output": apart.item()}
    return ce + KL * kl + MOE_OUTPUT * apart, parts


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        *((stage, {}) for stage in (0, 1, 2, 3)),
        (1, FULL),
        (2, selective("moe")),
        (3, FULL),
        (1, {"expert_backend": "sequential"}),
    ],
)
def test_loss_and_gradients_are_those_of_plain_pytorch(stage: int, changes: dict[str, Any]) -> None:
    examples = [batch(seed) for seed in (0, 1)]
    expected, plain = [], build(**NO_AUX, expert_backend=changes.get("expert_backend", "grouped"))
    for example in examples:
        total, parts = plain_loss(plain, teacher_model(), example)
        (total / 2).backward()
        expected.append((total.item(), parts))

    engine = start(build(**NO_AUX, **changes), accumulation=2, stage=stage)
    objective = Distillation(settings(), teacher_model(), engine.module)
    found = []
    for index, example in enumerate(examples):
        loss = objective(engine, example)
        engine.backward(loss)
        found.append(loss.item())
        if index == 0:
            engine.step()
    assert found == pytest.approx([total for total, _ in expected], rel=1e-6)
    parts = objective.take()
    assert parts == {
        name: pytest.approx(sum(part[name] for _, part in expected) / 2, rel=1e-5) for name in expected[0][1]
    }
    own = {name: safe_get_full_grad(weight) for name, weight in engine.module.named_parameters()}
    torch.testing.assert_close(own, gradients(plain), rtol=1e-4, atol=1e-7)


@pytest.mark.usefixtures("launched")
def test_a_teacher_like_the_student_has_nothing_to_teach_and_does_not_change() -> None:
    teacher = build(**NO_AUX).requires_grad_(False).eval()
    before = {name: value.clone() for name, value in teacher.named_parameters()}
    engine = start(build(**NO_AUX))
    objective = Distillation(settings(), teacher, engine.module)
    engine.backward(objective(engine, batch()))
    parts = objective.take()
    assert abs(parts["distill_kl"]) < 1e-6
    assert parts["distill_moe_output"] < 1e-10
    plain = build(**NO_AUX)
    logits = plain(*inputs(length=LENGTH)[:3])
    counted = batch()["loss_mask"].bool()
    cross_entropy(logits[counted], batch()["labels"][counted]).backward()
    own = {name: weight.grad for name, weight in engine.module.named_parameters()}
    torch.testing.assert_close(own, gradients(plain), rtol=1e-3, atol=1e-6)

    engine.step()
    engine.backward(objective(engine, batch(1)))
    assert objective.take()["distill_kl"] > 1e-4
    assert all(parameter.grad is None for parameter in teacher.parameters())
    torch.testing.assert_close(dict(teacher.named_parameters()), before, rtol=0, atol=0)


@pytest.mark.usefixtures("launched")
def test_the_student_comes_nearer_to_its_teacher() -> None:
    engine = start(build(**NO_AUX), lr=0.02)
    objective = Distillation(settings(kl=5.0, moe_output=5.0), teacher_model(), engine.module)
    parts = []
    for _ in range(6):
        engine.backward(objective(engine, batch()))
        engine.step()
        parts.append(objective.take())
    for name in ("distill_kl", "distill_moe_output"):
        assert parts[-1][name] < 0.95 * parts[0][name], name


@pytest.mark.usefixtures("launched")
def test_evaluation_compares_with_no_teacher() -> None:
    engine = start(build(**NO_AUX))
    objective = Distillation(settings(), teacher_model(), engine.module)
    expected = build(**NO_AUX).eval()(*inputs(length=LENGTH)[:3])
    engine.backward(objective(engine, batch()))
    engine.eval()
    with torch.no_grad():
        # Another number of sequences than the teacher was last given.
        found = engine(*(part[:1] for part in inputs(length=LENGTH)[:3]))
    torch.testing.assert_close(found, expected[:1])


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("changes", [{}, FULL, selective("moe")])
def test_what_the_teacher_said_is_not_kept(changes: dict[str, Any]) -> None:
    copies: list[weakref.ref[Tensor]] = []

    class Watched(dict[int, Tensor]):
        def __setitem__(self, layer: int, target: Tensor) -> None:
            copies.append(weakref.ref(target))
            super().__setitem__(layer, target)

    engine = start(build(**NO_AUX, **changes))
    objective = Distillation(settings(), teacher_model(), engine.module)

    objective._targets = Watched()
    loss = objective(engine, batch())
    engine.backward(loss)
    del loss
    assert len(copies) == 6
    assert not any(copy() is not None for copy in copies)


def test_what_is_frozen_depends_on_the_teacher() -> None:
    assert settings().frozen() == ("norms",)
    values = settings().model_dump(mode="json")
    assert parse_config(values | {"distill": {}}).frozen() == ()
    assert parse_config(values | {"optimizer": values["optimizer"] | {"freeze": []}}).frozen() == ()


@pytest.mark.parametrize(
    ("distill", "parallel", "line"),
    [
        ({"kl": 1.0}, {}, "distill.teacher = None: must be given with the other keys of distill"),
        ({"teacher": "x", "kl": 0.0, "moe_output": 0.0}, {}, "distill.kl = 0.0: must be > 0, or distill.moe_output"),
        ({"teacher": "x"}, {"tensor_model_parallel_size": 2}, "distill.teacher = 'x': must be null with tensor"),
    ],
)
def test_values_that_make_no_sense(distill: dict[str, Any], parallel: dict[str, int], line: str) -> None:
    values = settings().model_dump(mode="json") | {"distill": distill, "parallel": parallel}
    found = [str(problem) for problem in parse_config(values).problems(world_size=2)]
    assert any(problem.startswith(line) for problem in found)


EP, STAGE = "parallel.expert_model_parallel_size", "deepspeed.zero_optimization.stage"
STEPS = 4
RUNS = {
    "ep2": [f"{STAGE}=1", "checkpoint.save_every=2"],
    "ep1": [f"{EP}=1", f"{STAGE}=2"],
    "zero0": [f"{STAGE}=0"],
    "zero3": [f"{STAGE}=3"],
    "recompute": [
        *("model.recompute_granularity=full", "model.recompute_method=uniform", "model.recompute_num_layers=1")
    ],
    "bf16": ["train.precision=bf16"],
    "alone": ["distill.teacher=null", "optimizer.freeze=[norms]"],
}


class Recovered:
    """An untied run, the model that was made of it by tying, and runs that recover that."""

    def __init__(self, directory: Path, corpus: Corpus):
        self.directory = directory
        self._values = config_values(corpus, directory / "unused")
        self._values["train"] |= {"log_every": 1, "eval_every": 2, "eval_steps": 1}
        self._values["monitor"] = {"every": 2, "expensive_every": 4}
        self._config = directory / "config.json"
        self._config.write_text(json.dumps(self._values))

    def start(self, runs: dict[str, list[str]]) -> None:
        commands = {str(self.directory / name): overrides for name, overrides in runs.items()}
        launch("tests.training.many_runs", 2, str(self._config), json.dumps(commands))


@pytest.fixture(scope="module")
def recovered(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Recovered:
    made = Recovered(tmp_path_factory.mktemp("recovered"), corpus)
    made.start({"untied": ["train.steps=10", "tie.group_size=1", "checkpoint.save_every=10"]})
    tie = ("--tie-group-size", "4", "--tie-skip-first", "1", "--tie-skip-last", "0")
    matched = ("--tie-method", "matched", "--calibration", str(corpus.a), "--calibration-tokens", "2000")
    untied = made.directory / "untied"
    tied = convert("megatron-tied", "megatron-tied", untied, made.directory / "tied", *tie, *matched)
    given = [f"distill.teacher={untied}", f"train.init_from={tied}", f"train.steps={STEPS}"]
    # Small steps: the student stays near a teacher that has learnt little itself.
    given += ["optimizer.lr=1e-4", "optimizer.min_lr=1e-5", "optimizer.warmup_steps=0"]
    made.start({name: [*given, *overrides] for name, overrides in RUNS.items()})
    resume = f"train.resume={made.directory / 'ep2' / 'checkpoints' / 'step_00000002'}"
    made.start({"resumed": [*given, *RUNS["ep2"], resume]})
    return made


METRICS = ("loss", "lm_loss", "distill_kl", "distill_moe_output", "validation_loss")


@pytest.mark.parametrize("name", ["ep1", "zero0", "zero3", "recompute"])
def test_a_recovery_does_not_depend_on_ranks_stage_and_recompute(recovered: Recovered, name: str) -> None:
    for metric in METRICS:
        expected = series(recovered.directory / "ep2", metric)
        assert len(expected) == (2 if metric == "validation_loss" else STEPS)
        assert series(recovered.directory / name, metric) == pytest.approx(expected, rel=1e-5, abs=1e-7), metric


def test_in_bf16_it_is_the_same_to_rounding(recovered: Recovered) -> None:
    for metric in METRICS:
        expected = series(recovered.directory / "ep2", metric)
        rel = 0.1 if metric.startswith("distill") else 0.01
        assert series(recovered.directory / "bf16", metric) == pytest.approx(expected, rel=rel, abs=1e-4), metric


def test_a_recovery_that_goes_on_is_the_same_bit_for_bit(recovered: Recovered) -> None:
    for metric in METRICS:
        expected = [line[metric] for line in read_metrics(recovered.directory / "ep2") if metric in line]
        assert series(recovered.directory / "resumed", metric) == expected[len(expected) // 2 :], metric


@pytest.mark.usefixtures("launched")
def test_a_recovery_that_goes_on_otherwise_is_told(recovered: Recovered, tmp_path: Path) -> None:
    checkpoint = recovered.directory / "ep2" / "checkpoints" / "step_00000002"
    saved = Manifest.read(checkpoint).run
    train = saved["train"] | {"resume": str(checkpoint), "run_dir": str(tmp_path / "on")}
    same = choose_start(parse_config(saved | {"train": train})).remarks
    assert not any("distill" in remark for remark in same)
    distill = saved["distill"] | {"kl": 0.5, "teacher": str(checkpoint)}
    told = choose_start(parse_config(saved | {"train": train, "distill": distill})).remarks
    teacher, weight = (remark for remark in told if remark.startswith("warning: distill"))
    assert f"distill.teacher was {str(recovered.directory / 'untied')!r} and is {str(checkpoint)!r}: losses" in teacher
    assert "distill.kl was 0.1 and is 0.5: losses" in weight


def test_the_parts_make_the_loss(recovered: Recovered) -> None:
    lines = [line for line in read_metrics(recovered.directory / "ep2") if "loss" in line]
    for line in lines:
        routers = 5 * (0.01 * line["aux_loss"] + 0.001 * line["z_loss"])
        whole = line["lm_loss"] + 0.1 * line["distill_kl"] + 0.1 * line["distill_moe_output"] + routers
        assert line["loss"] == pytest.approx(whole, rel=1e-5)
    without = recovered.directory / "alone"
    assert not any("distill_kl" in line for line in read_metrics(without))
    # The same data from the same weights, by another gradient.
    assert series(without, "lm_loss")[0] == pytest.approx(lines[0]["lm_loss"], rel=1e-6)
    assert series(without, "lm_loss")[1] != pytest.approx(lines[1]["lm_loss"], rel=1e-6)


def test_norms_stay_as_they_were(recovered: Recovered) -> None:
    before, after = (WeightReader(recovered.directory / name) for name in ("tied", "ep2"))
    for name, weight in before:
        assert torch.equal(weight, after.read(name)) == name.endswith("layernorm.weight"), name


@pytest.mark.parametrize(
    ("teacher", "override", "line"),
    [
        ("none", "train.steps=4", "distill.teacher = .* cannot be used"),
        ("untied", "model.kv_channels=16", "model.kv_channels = 16: must be 8, as in"),
    ],
)
def test_what_is_no_teacher_is_refused(recovered: Recovered, teacher: str, override: str, line: str) -> None:
    with pytest.raises(AssertionError, match=line):
        recovered.start({"other": [f"distill.teacher={recovered.directory / teacher}", override]})
    assert not (recovered.directory / "other").exists()


def test_the_example_is_a_recovery(corpus: Corpus) -> None:
    config = load_config(Path(__file__).parents[2] / "examples" / "recover.yaml")
    assert config.problems(world_size=2) == []
    assert config.distill.teacher is not None
    assert config.train.init_from is not None
    assert config.frozen() == ("norms",)
    quickstart = load_config(Path(__file__).parents[2] / "examples" / "quickstart.yaml")
    assert config.model == quickstart.model
    assert config.data == quickstart.data
