"""What tensor parallelism needs of groups and model, and what is said when that is missing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core import parallel_state

from megatron_tied import ConfigError, initialize_model_parallel
from megatron_tied.engine.groups import model_parallel_unit
from megatron_tied.engine.tensor_parallel import sum_partial_gradients
from tests.tiny_model import build


@pytest.fixture
def two_ranks(one_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups that say they have two tensor parallel ranks."""
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_group", lambda: SimpleNamespace(size=lambda: 2))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: tensor.mul_(2))


def test_sizes_must_divide_the_world(launched: None) -> None:
    with pytest.raises(ConfigError) as caught:
        initialize_model_parallel(expert_model_parallel_size=2, tensor_model_parallel_size=3)
    assert [str(problem) for problem in caught.value.problems] == [
        "parallel.expert_model_parallel_size = 2: must divide the world size 1",
        "parallel.tensor_model_parallel_size = 3: must divide the world size 1",
    ]


def test_a_model_that_ranks_cannot_share_is_refused(two_ranks: None) -> None:
    with pytest.raises(ConfigError) as caught:
        build(vocab_size=63)
    (problem,) = caught.value.problems
    assert str(problem) == "parallel.tensor_model_parallel_size = 2: must divide model.vocab_size = 63; valid: 1"


def test_deepspeed_gets_groups_only_with_tensor_parallelism(one_process: None, request: pytest.FixtureRequest) -> None:
    assert model_parallel_unit() is None
    request.getfixturevalue("two_ranks")
    unit = model_parallel_unit()
    assert unit.get_data_parallel_group_ranks() == [0]


def test_only_marked_gradients_are_summed_and_only_once(two_ranks: None) -> None:
    layer = torch.nn.Linear(3, 1)
    layer.bias.sequence_parallel = True
    for _ in range(2):
        sum_partial_gradients(layer)
    layer(torch.ones(1, 3)).sum().backward()
    assert layer.bias.grad.tolist() == [2.0]
    assert layer.weight.grad.tolist() == [[1.0, 1.0, 1.0]]


def test_a_model_without_marks_is_an_error(two_ranks: None) -> None:
    with pytest.raises(RuntimeError, match="no parameter carries Megatron-Core's sequence_parallel mark"):
        sum_partial_gradients(torch.nn.Linear(3, 1))
