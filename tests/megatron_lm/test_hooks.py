"""What the launcher hangs into Megatron-LM's functions, with stand-ins for these."""

from __future__ import annotations

import sys
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.optimizer import OptimizerConfig

from megatron_tied.errors import ConfigError
from megatron_tied.megatron_lm import bank_learning_rates, copies, hooks, theoretical_memory, tie, topology_from_args
from tests.megatron_lm.arguments import parse

TIED, UNTIED = ("--moe-tie-group-size", "4"), ()


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Namespace:
    """The arguments that Megatron-LM's `get_args` returns; `args` is to be set."""
    training = SimpleNamespace(get_args=lambda: training.args)
    monkeypatch.setitem(sys.modules, "megatron.training", training)
    return training


def test_learning_rates_of_tied_banks_are_overridden() -> None:
    config = OptimizerConfig(lr=6.0, min_lr=3.0)
    args = parse(*TIED)
    found, overrides = hooks.with_bank_learning_rates(lambda args: (config, {"kept": 1}))(args)
    expected = bank_learning_rates(config, topology_from_args(args))
    assert expected
    assert (found, overrides) == (config, {"kept": 1} | expected)
    assert hooks.with_bank_learning_rates(lambda args: (config, None))(parse(*UNTIED)) == (config, None)


@pytest.mark.parametrize(("flags", "is_tied"), [(TIED, True), (UNTIED, False)])
def test_copies_of_banks_are_summed_after_gradients_are_finalized(
    flags: tuple[str, ...], is_tied: bool, given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given.args = parse(*flags)
    done: list[object] = []
    monkeypatch.setattr(copies, "sum_bank_copies", lambda model: done.append(("summed", model)))
    result = hooks.with_bank_copies_summed(lambda model: done.append(("finalized", model)) or "result")(["chunk"])
    assert result == "result"
    assert done == [("finalized", ["chunk"]), ("summed", ["chunk"])][: 1 + is_tied]


@pytest.mark.parametrize(("flags", "tied"), [(TIED, [["a", "b"]]), (UNTIED, [])])
def test_chunks_are_tied_when_the_last_of_a_stage_is_there(
    flags: tuple[str, ...], tied: list[list[str]], given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given.args = parse(*flags, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    done: list[tuple[list[str], object]] = []
    monkeypatch.setattr(tie, "tie_experts", lambda chunks, topology: done.append((list(chunks), topology)))
    built = hooks.with_tied_chunks(lambda provide: [provide(name) for name in "ab"])(lambda name: name)
    assert built == ["a", "b"]
    assert [chunks for chunks, _ in done] == tied
    assert all(topology == topology_from_args(given.args) for _, topology in done)


def test_another_checkpoints_banks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    here, other = parse(*TIED), parse("--moe-tie-group-size", "2")
    for saved in ({"args": here}, {}, None):
        loaded = (saved, "name")
        assert hooks.with_banks_compared(lambda directory, args, loaded=loaded: loaded)("dir", here) == loaded
    with pytest.raises(ConfigError, match="must be that of the checkpoint"):
        hooks.with_banks_compared(lambda directory, args: ({"args": other}, "name"))("dir", here)


@pytest.mark.parametrize(("flags", "counted"), [(TIED, 1), (UNTIED, 0)])
def test_the_memory_report_counts_banks_once(
    flags: tuple[str, ...], counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[Namespace] = []

    class Counting:
        def __init__(self, args: Namespace):
            entered.append(args)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(theoretical_memory, "counting_banks_once", Counting)
    args = parse(*flags)
    counting = hooks.with_banks_counted_once(lambda args, verbose: ("bytes", verbose))
    assert counting(args, verbose=True) == ("bytes", True)
    assert entered == [args] * counted
