"""fp16: an overflow on one rank skips the step on all, and a loss scale that cannot fall further ends the run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.launch import launch

SCALE, FLOOR = 16.0, 4


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks found."""
    result = tmp_path_factory.mktemp("loss_scale") / "result"
    launch("tests.distributed.loss_scale_worker", 2, str(result))
    return torch.load(result, weights_only=False)


@pytest.mark.parametrize("overflow", ["overflow_of_loss", "overflow_of_experts"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_overflow_on_one_rank_skips_the_step_on_all(ranks: list[dict[str, Any]], stage: int, overflow: str) -> None:
    for rank in ranks:
        found = rank["overflow"][stage, overflow]
        assert found["applied"] == [True, False, True]
        assert found["scales"] == [SCALE, SCALE, SCALE / 2, SCALE / 2]
        begin, after_sound, after_overflow, after_next = found["states"]
        assert after_sound == after_overflow
        # Every parameter moves in a sound step, the one whose gradient was spoiled included.
        for before, after in ((begin, after_sound), (after_overflow, after_next)):
            assert [name for name in before if before[name] == after[name]] == []
    replicated = [name for name in begin if ".experts." not in name]
    last = [rank["overflow"][stage, overflow]["states"][-1] for rank in ranks]
    assert [name for name in replicated if last[0][name] != last[1][name]] == []


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_floor_ends_the_run_on_all_ranks_at_one_step(ranks: list[dict[str, Any]], stage: int) -> None:
    told = {rank["floor"][stage] for rank in ranks}
    assert len(told) == 1
    # 16, 8, 4: the third overflow finds the scale at its floor.
    assert told.pop().startswith("step 3: gradients overflow at the smallest loss scale")
