"""Imported models on four ranks: logits at every degree of expert parallelism, and the first step of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.convert.hf_models import MODELS, convert, load, logits, save, some_tokens
from tests.distributed.launch import launch
from tests.distributed.matrix import LIMITS, Job, material, reference
from tests.oracle.reference import build_reference

JOBS = {arch: Job(arch, steps=1, global_batch=4) for arch in ("olmoe", "qwen3_moe")}
PLACES = ((1, "grouped"), (2, "sequential"), (4, "grouped"), (4, "sequential"))


def places(name: str) -> tuple[tuple[int, str], ...]:
    """Where a model is tried: variants of another in one place only."""
    return PLACES if name in ("olmoe", "qwen3_moe", "deepseek_v2", "deepseek_v3") else PLACES[1:2]


def untied_reference(job: Job, directory: Path) -> Path:
    """The oracle's model, its tied layers' experts written out, as a Hugging Face directory."""
    model = build_reference(material(job)["spec"], {"olmoe": 7, "qwen3_moe": 14}[job.arch])
    model.save_pretrained(directory, state_dict={name: value.clone() for name, value in model.state_dict().items()})
    return directory


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("parallel")
    imported = {
        name: convert("hf", "megatron-tied", save(name, directory / name), directory / f"{name}.mt", "--no-verify")
        for name in MODELS
    }
    cases = [(name, ep, backend) for name in MODELS for ep, backend in places(name)]
    steps = []
    for arch, job in JOBS.items():
        original = untied_reference(job, directory / f"{arch}.reference")
        banks = ",".join(map(str, job.banks))
        options = ("--tie-banks", banks, "--tie-method", "owner", "--no-verify")
        steps.append((convert("hf", "megatron-tied", original, directory / f"{arch}.tied", *options), material(job)))
    job_file, result_file = directory / "job", directory / "result"
    work = {
        "tokens": some_tokens(),
        "cases": [(imported[name], ep, backend) for name, ep, backend in cases],
        "steps": steps,
    }
    torch.save(work, job_file)
    launch("tests.convert.parallel_worker", 4, str(job_file), str(result_file))
    found = torch.load(result_file, weights_only=False)
    expected = {name: logits(load(directory / name), some_tokens()) for name in MODELS}
    return {"logits": dict(zip(cases, found["logits"], strict=True)), "expected": expected, "steps": found["steps"]}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers_everywhere(name: str, outcome: dict[str, Any]) -> None:
    expected = outcome["expected"][name]
    for ep, backend in places(name):
        found = outcome["logits"][name, ep, backend]
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max(), (ep, backend)


@pytest.mark.parametrize("arch", JOBS)
def test_the_first_step_is_that_of_transformers_with_aliased_experts(arch: str, outcome: dict[str, Any]) -> None:
    expected = reference(JOBS[arch], 4, "sqrt")
    found = outcome["steps"][list(JOBS).index(arch)]
    for name, value in found["losses"].items():
        assert value == pytest.approx(getattr(expected.steps[0], name), rel=LIMITS["loss"]), name
    assert found["gradients"].keys() == expected.first_gradients.keys()
    for name, gradient in expected.first_gradients.items():
        error = (found["gradients"][name] - gradient).norm() / gradient.norm()
        assert error < LIMITS["first gradient"], name
