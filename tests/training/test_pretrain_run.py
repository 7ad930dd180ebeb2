"""What one run under the deepspeed launcher leaves behind and prints."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_tied.monitor.sinks import tensorboard_tag
from megatron_tied.planner.parameters import count_parameters
from megatron_tied.training.config import RunConfig
from megatron_tied.training.config_file import load_config
from megatron_tied.training.schedule import lr_factor
from tests.training.conftest import Run
from tests.training.runs import read_metrics, series

STEPS, EVALUATED = 12, [5, 10, 12]
LEARNING_RATES = {"lr", "lr/dense", "lr/dense_no_decay", "lr/experts", "lr/experts_lr_div_2"}
FIGURES = {
    *("loss", "lm_loss", "aux_loss", "z_loss", "grad_norm", "tokens", "tokens_per_second"),
    *("perplexity", "step_seconds", "eta_seconds", "memory_gb", "memory_fullest_gb", "states_gb"),
    *(f"time/{phase}" for phase in ("data", "forward", "backward", "reduce", "optimizer", "other")),
    *("parameters_unique", "parameters_untied"),
    *("planned_memory_gb", "planned_states_gb", "planned_tokens_per_second"),
    *LEARNING_RATES,
}
LAYER_FIGURES = {
    *("load_min", "load_max", "load_std", "load_p50", "load_p75", "load_p95", "max_vio", "balance_loss"),
    *("token_entropy", "mean_entropy", "max_logit", "z_loss", "dropped", "dead_fraction"),
}
# Five layers; the first has bank 0, the others share bank 1.
OBSERVED = {
    *(f"layer_{figure}/{layer:02d}" for figure in LAYER_FIGURES | {"ep_busiest"} for layer in range(5)),
    *(f"bank_{figure}/{bank:02d}" for figure in LAYER_FIGURES for bank in range(2)),
    *(f"routing/{name}" for name in ("max_vio", "max_vio_worst", "balance_loss", "token_entropy", "mean_entropy")),
    *(f"routing/{name}" for name in ("dead_fraction", "max_logit", "z_loss", "dropped")),
    *("routing/ep_busiest", "routing/ep_busiest_worst", "all_to_all/gb", "all_to_all/seconds"),
    *(f"agreement_{form}{chance}/01" for form in ("top1", "overlap", "distinct") for chance in ("", "_chance")),
}
EXAMINED = {
    *(f"bank_{figure}/{bank:02d}" for figure in ("weight_norm", "gradient_norm", "update_norm") for bank in range(2)),
    *("bank_update_ratio/00", "bank_update_ratio/01"),
    *("bank_gradient_cosine/01", "bank_gradient_cosine_min/01", "bank_gradient_cancellation/01"),
}
TABLES = {"expert_load", "bank_load", "agreement"}


@pytest.fixture(scope="module")
def config(reference_run: Run) -> RunConfig:
    return load_config(reference_run.config)


@pytest.fixture(scope="module")
def steps(reference_run: Run) -> list[dict[str, float]]:
    return [line for line in read_metrics(reference_run.directory) if "loss" in line]


def test_every_step_and_every_evaluation_is_one_line(reference_run: Run):
    lines = read_metrics(reference_run.directory)
    found = [(line["step"], line.keys() - {"step"}) for line in lines]
    expected = []
    for step in range(1, STEPS + 1):
        observed = OBSERVED if step % 5 == 0 else set()
        examined = EXAMINED if step % 10 == 0 else set()
        expected.append((step, FIGURES | observed | examined))
        expected += [(step, TABLES)] if examined else []
        expected += [(step, {"validation_loss"})] if step in EVALUATED else []
    assert found == expected
    for line in lines:
        assert all(math.isfinite(value) for name, value in line.items() if name not in TABLES)


def test_loss_falls_from_that_of_guessing(steps: list[dict[str, float]], reference_run: Run):
    assert steps[0]["lm_loss"] == pytest.approx(math.log(320), abs=0.1)
    assert steps[-1]["lm_loss"] < steps[0]["lm_loss"] - 1
    validation = series(reference_run.directory, "validation_loss")
    assert validation == sorted(validation, reverse=True)
    assert validation[-1] == pytest.approx(steps[-1]["lm_loss"], abs=0.3)


def test_loss_is_the_objective(steps: list[dict[str, float]]):
    layers = 5
    for line in steps:
        extra = layers * (0.01 * line["aux_loss"] + 0.001 * line["z_loss"])
        assert line["loss"] == pytest.approx(line["lm_loss"] + extra, rel=1e-6)
        assert line["aux_loss"] >= 0.99  # 1 is perfectly even


def test_learning_rates_follow_the_schedule_and_keep_their_ratio(steps: list[dict[str, float]], config: RunConfig):
    for line in steps:
        lr = 5e-3 * lr_factor(line["step"] - 1, STEPS, config.optimizer)
        for name in ("lr", "lr/dense", "lr/dense_no_decay", "lr/experts"):
            assert line[name] == pytest.approx(lr)
        assert line["lr/experts_lr_div_2"] == pytest.approx(lr / 2)  # sqrt of the 4 layers of the tied bank


def test_tokens_and_speed(steps: list[dict[str, float]]):
    for line in steps:
        assert line["tokens"] == line["step"] * 8 * 32
        assert line["tokens_per_second"] == pytest.approx(8 * 32 / line["step_seconds"])
        assert 0.05 < line["memory_gb"] < 8
        assert line["states_gb"] == pytest.approx(line["planned_states_gb"], rel=0.01)


def test_tensorboard_holds_the_same(reference_run: Run):
    events = EventAccumulator(str(reference_run.directory / "tensorboard"))
    events.Reload()
    expected: dict[str, list[tuple[int, float]]] = {}
    for line in read_metrics(reference_run.directory):
        for name in line.keys() - {"step"} - TABLES:
            expected.setdefault(tensorboard_tag(name), []).append((line["step"], line[name]))
    assert set(events.Tags()["scalars"]) == expected.keys()
    assert expected.keys() >= {
        *("train/loss", "train/lm_loss", "train/grad_norm", "moe/aux_loss", "moe/z_loss"),
        *("lr/dense", "lr/experts", "lr/experts_lr_div_2"),
        *("progress/tokens_per_second", "system/memory_gb", "validation/validation_loss"),
    }
    assert set(events.Tags()["images"]) == {"load/layers", "load/banks", "agreement/groups"}
    for tag, points in expected.items():
        drawn = events.Scalars(tag)
        assert [point.step for point in drawn] == [step for step, _ in points]
        assert [point.value for point in drawn] == pytest.approx([value for _, value in points], rel=1e-6)


def test_summary(reference_run: Run, config: RunConfig, steps: list[dict[str, float]]):
    summary = json.loads((reference_run.directory / "summary.json").read_text())
    count = count_parameters(config.model, config.topology(), vocab_size=320)
    assert summary["parameters"] == {
        "unique": count.total,
        "untied": count.untied,
        "unique_bytes": 4 * count.total,
        "untied_bytes": 4 * count.untied,
        "banks": 2,
        "moe_layers": 5,
    }
    assert (summary["steps"], summary["world_size"]) == (STEPS, 2)
    assert summary["topology"] == "5 layers: 0 [1 2 3 4]"
    assert {name: summary[name] for name in FIGURES} == {name: steps[-1][name] for name in FIGURES}
    assert summary["validation_loss"] == series(reference_run.directory, "validation_loss")[-1]
    assert "routing/max_vio" in summary
    assert not [name for name in summary if name.startswith(("layer_", "bank_"))], "of the whole model only"


def test_saved_config_is_the_resolved_one(reference_run: Run, config: RunConfig):
    saved = load_config(reference_run.directory / "config.yaml")
    assert config.model.vocab_size is None
    assert saved == config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 320})})


def test_nothing_unfinished_is_left(reference_run: Run):
    names = sorted(path.name for path in reference_run.directory.iterdir())
    assert names == [".run.lock", "config.yaml", "metrics.jsonl", "summary.json", "tensorboard"]


def test_every_line_is_ours_and_printed_once(reference_run: Run):
    *start, end = reference_run.finished.our_lines
    directory = re.escape(str(reference_run.directory))
    introduction = [
        f"{directory}: 12 steps of 8 x 32 tokens; processes 2, expert parallel 2, ZeRO 1, fp32",
        r"5 layers: 0 \[1 2 3 4\]; [\d,]+ parameters, untied [\d,]+",
    ]
    step = r"step {}/12  loss \d\.\d{{4}}  grad norm \d+\.\d{{3}}  lr \d\.\d\de-0\d  [\d,]+ tokens/s  [\d:]+ left"
    progress = []
    for number in range(1, STEPS + 1):
        progress.append(step.format(number))
        if number == 1:
            progress.append(
                r"plan against measured: weights and optimizer states (\d+\.\d{3}) GB, measured \1; all tensors at the "
                r"peak \d+\.\d{3} GB, resident now \d+\.\d{3} GB, with libraries, without untouched buckets; "
                r"[\d,]+ tokens/s by the figures of cpu in hardware\.yaml, measured [\d,]+"
            )
        if number in EVALUATED:
            progress.append(rf"step {number}: validation loss \d\.\d{{4}}")
    for line, pattern in zip(start, [*introduction, *progress], strict=True):
        assert re.fullmatch(pattern, line), line
    assert re.fullmatch(rf"finished in \d+ s: {directory}/summary\.json", end)


def test_the_launcher_warns_of_nothing_but_the_host(reference_run: Run):
    warnings = {line.partition("] ")[2] for line in reference_run.finished.output.splitlines() if "[WARNING]" in line}
    # A host without GPUs, and without a hostfile, is one that people may have on purpose.
    assert all("Setting accelerator to CPU" in text or "Unable to find hostfile" in text for text in warnings), warnings


def test_index_cache_lies_beside_the_data(reference_run: Run, config: RunConfig):
    assert isinstance(config.data.train, str)
    assert (Path(config.data.train).parent / "index_cache").is_dir()
