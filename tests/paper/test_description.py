"""The paper's configs are what the description says, and have the parameters that the paper counts."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch
from description import CONFIGS, as_text, grids

from megatron_tied.models import gpt
from megatron_tied.planner.parameters import count_parameters
from megatron_tied.training.config import RunConfig
from megatron_tied.training.config_file import load_config

FILES = sorted(CONFIGS.glob("*/*.yaml"))
# The totals of the paper's tables.
PUBLISHED = {
    **dict.fromkeys(("main/olmoe-regular-g1", "main/deepseek-regular-g1"), 7_123_851_264),
    **dict.fromkeys(("main/olmoe-regular-g2", "main/deepseek-regular-g2"), 4_707_932_160),
    **dict.fromkeys(("main/olmoe-regular-g4", "main/deepseek-regular-g4"), 3_499_972_608),
    **dict.fromkeys(("main/olmoe-regular-g4-w2x", "main/deepseek-regular-g4-w2x"), 4_709_505_024),
    **dict.fromkeys(("main/olmoe-regular-g4-w4x", "main/deepseek-regular-g4-w4x"), 7_128_569_856),
    **dict.fromkeys(("main/olmoe-tiny-g1", "main/deepseek-tiny-g1"), 522_671_616),
    **dict.fromkeys(("main/olmoe-tiny-g2", "main/deepseek-tiny-g2"), 371_676_672),
    **dict.fromkeys(("main/olmoe-tiny-g4", "main/deepseek-tiny-g4"), 296_179_200),
    "main/qwen3_moe-regular-g1": 6_410_289_152,
    "main/qwen3_moe-regular-g2": 3_862_249_472,
    "main/qwen3_moe-regular-g4": 2_588_229_632,
    "main/qwen3_moe-tiny-g1": 458_906_240,
    "main/qwen3_moe-tiny-g2": 299_653_760,
    "main/qwen3_moe-tiny-g4": 220_027_520,
}


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def config_of(name: str) -> RunConfig:
    return load_config(CONFIGS / f"{name}.yaml")


def test_the_files_are_what_the_description_gives() -> None:
    described = {f"{grid}/{name}": as_text(row) for grid, rows in grids().items() for name, row in rows.items()}
    assert {name_of(path): path.read_text() for path in FILES} == described, "run: python examples/paper/description.py"


def test_there_is_every_row_of_the_papers_tables() -> None:
    """3 architectures x 3 scales x 6 variants, and an ablation of 43 runs."""
    counts = {grid: len(rows) for grid, rows in grids().items()}
    assert counts == {"main": 54, "ablation": 43, "miniature": 6}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_is_wrong_with_any_config(path: Path) -> None:
    assert load_config(path).problems(1 if path.parent.name == "miniature" else 4) == []


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", PUBLISHED)
def test_built_models_have_the_published_number_of_parameters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(name)
    monkeypatch.setattr(gpt, "initialize_weights", lambda *_: None)  # of no use on the meta device
    with torch.device("meta"):
        model = gpt.build_gpt_model(config.model, config.tie, precision="bf16")
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


def test_the_ablation_begins_with_488_million() -> None:
    config = config_of("ablation/fine-untied")
    # 32 layers: experts, attention, router, norms and those of queries and keys; embedding, last norm.
    layer = 32 * 3 * 512 * 256 + 4 * 512**2 + 32 * 512 + 2 * 512 + 2 * 64
    expected = 32 * layer + 100_277 * 512 + 512
    assert count_parameters(config.model, config.topology()).total == expected
    assert round(expected / 1e6) == 488


@pytest.mark.parametrize("of", ["olmoe-regular", "deepseek-tiny", "qwen3_moe-small"])
def test_a_narrow_model_has_as_many_experts_as_a_tied_one(of: str) -> None:
    """Its routers are narrower, too: by that alone the two differ."""
    configs = [config_of(f"main/{of}-{variant}") for variant in ("narrow", "g4")]
    counts = [count_parameters(config.model, config.topology()) for config in configs]
    middle = configs[1].model.num_layers - 4
    fewer = configs[1].model.num_moe_experts - configs[0].tie.num_tied_experts
    assert counts[1].total - counts[0].total == middle * fewer * configs[1].model.hidden_size


def test_loops_are_those_of_their_names() -> None:
    banks = {
        topology: config_of(f"ablation/fine-{topology}-experts_attention").topology().banks
        for topology in ("moeut", "1group", "2groups", "3groups", "4groups", "7groups")
    }
    sizes = {topology: [bank.size for bank in of] for topology, of in banks.items()}
    ends = [1, 1]
    assert sizes == {
        "moeut": [16, 16],
        "1group": [*ends, 14, 14, *ends],
        "2groups": [*ends, 7, 7, 7, 7, *ends],
        "3groups": [*ends, 5, 5, 4, 4, 5, 5, *ends],
        "4groups": [*ends, 7, 7, 7, 7, *ends],
        "7groups": [*ends, *[4] * 7, *ends],
    }
    assert [bank.layers[:2] for bank in banks["2groups"]][2:4] == [(2, 4), (3, 5)]
    assert [bank.layers[:2] for bank in banks["4groups"]][2:4] == [(2, 3), (9, 10)]
    assert list(chain.from_iterable(bank.layers for bank in banks["moeut"])) == [*range(0, 32, 2), *range(1, 32, 2)]
