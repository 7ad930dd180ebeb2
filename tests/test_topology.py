"""The map from MoE layer to expert bank: fixed tables, and properties that hold for every layout."""

from __future__ import annotations

import json
import math
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from megatron_tied.errors import ConfigError
from megatron_tied.topology import Bank, TieConfig, TieTopology


def layout(tie: TieConfig, num_layers: int, moe_layers: list[int] | None = None) -> list[tuple[int, ...]]:
    return [bank.layers for bank in TieTopology.build(tie, num_layers, moe_layers).banks]


def problem_fields(error: pytest.ExceptionInfo[ConfigError]) -> list[str]:
    return [problem.field for problem in error.value.problems]


# ---- tables -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tie", "num_layers", "expected"),
    [
        (TieConfig(group_size=4), 12, [(0,), (1,), (2, 3, 4, 5), (6, 7, 8, 9), (10,), (11,)]),
        (TieConfig(group_size=3), 9, [(0,), (1,), (2, 3, 4), (5, 6), (7,), (8,)]),
        (TieConfig(group_size=2), 7, [(0,), (1,), (2, 3), (4,), (5,), (6,)]),
        (TieConfig(group_size=2, skip_first=0, skip_last=1), 5, [(0, 1), (2, 3), (4,)]),
        (TieConfig(), 3, [(0,), (1,), (2,)]),
        (
            TieConfig(group_size=2, pattern="cyclic", block_size=2, skip_first=1, skip_last=1),
            10,
            [(0,), (1, 3), (2, 4), (5, 7), (6, 8), (9,)],
        ),
        (
            TieConfig(group_size=3, pattern="cyclic", block_size=2, skip_first=0, skip_last=0),
            10,
            [(0, 2, 4), (1, 3, 5), (6, 8), (7, 9)],
        ),
        (
            TieConfig(group_size=5, pattern="cyclic", block_size=2, skip_first=0, skip_last=0),
            9,
            [(0, 2, 4, 6, 8), (1, 3, 5, 7)],
        ),
        (TieConfig(banks=[0, 1, 1, 2, 2, 3]), 6, [(0,), (1, 2), (3, 4), (5,)]),
        (TieConfig(banks=[7, -1, 7, 3, -1], group_size=4, skip_first=9), 5, [(0, 2), (1, 4), (3,)]),
        (
            # Of the paper: 2 + [2 x 5] + [2 x 4] + [2 x 5] + 2, blocks of two layers that are looped unequally often.
            TieConfig(banks=[0, 1, *[2, 3] * 5, *[4, 5] * 4, *[6, 7] * 5, 8, 9]),
            32,
            [
                *((0,), (1,), (2, 4, 6, 8, 10), (3, 5, 7, 9, 11), (12, 14, 16, 18), (13, 15, 17, 19)),
                *((20, 22, 24, 26, 28), (21, 23, 25, 27, 29), (30,), (31,)),
            ],
        ),
    ],
)
def test_layout(tie, num_layers, expected):
    assert layout(tie, num_layers) == expected


def test_dense_layers_are_neither_tied_nor_counted_as_prelude():
    topology = TieTopology.build(TieConfig(group_size=2, skip_first=1, skip_last=1), 8, [1, 2, 4, 6, 7])
    assert topology.bank_of_layer == (None, 0, 1, None, 1, None, 2, 3)
    assert topology.moe_layers == (1, 2, 4, 6, 7)
    assert not topology.is_owner(0)
    with pytest.raises(ValueError, match="layer 3 is dense"):
        topology.bank(3)


@pytest.mark.parametrize(
    ("num_layers", "group_size", "num_banks"),
    [(16, 1, 16), (16, 2, 10), (16, 4, 7), (28, 1, 28), (28, 2, 16), (28, 4, 10)],
)
def test_bank_counts_of_the_published_models(num_layers, group_size, num_banks):
    assert len(layout(TieConfig(group_size=group_size), num_layers)) == num_banks


@pytest.mark.parametrize(
    ("rule", "four_layers", "two_layers"),
    [("sqrt", 2.0, math.sqrt(2)), ("linear", 4.0, 2.0), ("none", 1.0, 1.0), (3, 3.0, 3.0)],
)
def test_lr_divisor_follows_the_banks_own_number_of_layers(rule, four_layers, two_layers):
    topology = TieTopology.build(TieConfig(group_size=4, lr_divisor=rule), 10)
    untied, tied, remainder = topology.bank(0), topology.bank(2), topology.bank(6)
    assert topology.lr_divisor(tied) == four_layers
    assert topology.lr_divisor(remainder) == two_layers
    assert topology.lr_divisor(untied) == 1.0


def test_width_expansion_reaches_tied_banks_only():
    topology = TieTopology.build(TieConfig(group_size=4, num_tied_experts=128), 9)
    assert [topology.num_experts(bank, 64) for bank in topology.banks] == [64, 64, 128, 64, 64, 64]
    assert [topology.num_experts(layer, 64) for layer in (1, 2, 5, 6)] == [64, 128, 128, 64]
    assert TieTopology.build(TieConfig(group_size=4), 9).num_experts(2, 64) == 64


def test_width_of_an_untied_model_is_that_of_the_middle():
    narrow = TieTopology.build(TieConfig(skip_first=1, skip_last=2, num_tied_experts=16), 8, [1, 2, 3, 4, 6, 7])
    assert [narrow.num_experts(layer, 64) for layer in narrow.moe_layers] == [64, 16, 16, 16, 64, 64]
    by_map = TieTopology.build(TieConfig(banks=list(range(6)), num_tied_experts=16), 6)
    assert [by_map.num_experts(layer, 64) for layer in by_map.moe_layers] == [64] * 6


@pytest.mark.parametrize("share", ["experts", "experts_attention", "all"])
def test_more_is_shared_where_layers_are_tied(share):
    tied, untied = (TieTopology.build(TieConfig(group_size=size, share=share), 8) for size in (4, 1))
    assert tied.shares_more == (share != "experts")
    assert not untied.shares_more


def test_describe():
    assert TieTopology.build(TieConfig(group_size=4), 8).describe() == "8 layers: 0 1 [2 3 4 5] 6 7"
    shared = TieTopology.build(TieConfig(group_size=2, skip_first=1, skip_last=0, share="all"), 3)
    assert shared.describe() == "3 layers: 0 [1 2]; shared: experts, attention, router"
    cyclic = TieConfig(group_size=2, pattern="cyclic", block_size=2, skip_first=0, skip_last=0)
    assert TieTopology.build(cyclic, 5, [1, 2, 3, 4]).describe() == "5 layers: [1 3] [2 4]; dense: 0"
    wider = TieConfig(group_size=2, skip_first=1, skip_last=0, num_tied_experts=12, share="experts_attention")
    described = TieTopology.build(wider, 4, [1, 2, 3]).describe()
    assert described == "4 layers: 1 [2 3]; experts of tied banks: 12; shared: experts, attention; dense: 0"
    narrow = TieTopology.build(TieConfig(skip_first=1, skip_last=0, num_tied_experts=12), 3)
    assert narrow.describe() == "3 layers: 0 1 2; experts of middle banks: 12"
    unused = TieTopology.build(TieConfig(banks=[0, 1, 2], num_tied_experts=12), 3)
    assert unused.describe() == "3 layers: 0 1 2"


# ---- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("group_size", 0),
        ("group_size", True),
        ("group_size", 2.0),
        ("skip_first", -1),
        ("skip_last", "2"),
        ("pattern", "random"),
        ("block_size", 0),
        ("block_size", 2),  # without the cyclic pattern it would be ignored
        ("banks", [0, "1"]),
        ("banks", 3),
        ("num_tied_experts", 0),
        ("lr_divisor", 0),
        ("lr_divisor", -1.0),
        ("lr_divisor", math.inf),
        ("lr_divisor", True),
        ("lr_divisor", "cube"),
        ("weight_gradient", "eager"),
        ("share", "attention"),
    ],
)
def test_problems_name_the_field(field, value):
    problems = TieConfig(**{field: value}).problems()
    assert [problem.field for problem in problems] == [f"tie.{field}"]
    assert problems[0].value == (tuple(value) if isinstance(value, list) else value)


def test_cyclic_groups_of_neighbours_are_consecutive_ones() -> None:
    cyclic, consecutive = (TieTopology.build(TieConfig(2, pattern=name), 9) for name in ("cyclic", "consecutive"))
    assert cyclic.banks == consecutive.banks


def test_all_problems_come_at_once():
    with pytest.raises(ConfigError) as error:
        TieTopology.build(TieConfig(group_size=0, skip_first=-1, lr_divisor="cube"), 16)
    assert problem_fields(error) == ["tie.group_size", "tie.skip_first", "tie.lr_divisor"]


@pytest.mark.parametrize(
    ("tie", "num_layers", "moe_layers", "field", "message"),
    [
        (TieConfig(group_size=2), 3, None, "tie.skip_first", "3 MoE layers together with tie.skip_last = 2"),
        (TieConfig(group_size=5), 8, None, "tie.group_size", "at most 4: 4 MoE layers lie between"),
        (TieConfig(group_size=2), 4, None, "tie.group_size", "at most 1: 0 MoE layers"),
        (
            TieConfig(group_size=3, pattern="cyclic", block_size=2),
            8,
            None,
            "tie.group_size",
            "at most 2 with tie.block_size = 2",
        ),
        (TieConfig(group_size=3), 8, [0, 1, 3, 4, 6, 7], "tie.group_size", "at most 2"),
        (TieConfig(banks=[0, 1, 1]), 4, None, "tie.banks", "one entry per MoE layer: 4, not 3"),
        (TieConfig(), 0, None, "model.num_layers", ">= 1"),
        (TieConfig(), 4, [0, 4], "moe_layers", "from 0 to 3"),
        (TieConfig(), 4, [2, 1], "moe_layers", "in order"),
        (TieConfig(), 4, [1, 1], "moe_layers", "each once"),
    ],
)
def test_what_does_not_fit_the_layers(tie, num_layers, moe_layers, field, message):
    with pytest.raises(ConfigError, match=message) as error:
        TieTopology.build(tie, num_layers, moe_layers)
    assert problem_fields(error) == [field]


class Section(BaseModel):
    tie: TieConfig = TieConfig()


def test_nested_in_a_pydantic_model():
    tie = Section.model_validate({"tie": {"banks": [0, 1, 1], "lr_divisor": "linear"}}).tie
    assert tie == TieConfig(banks=(0, 1, 1), lr_divisor="linear")
    assert hash(tie) == hash(TieConfig(banks=[0, 1, 1], lr_divisor="linear"))
    with pytest.raises(ValidationError, match="group_sise"):
        Section.model_validate({"tie": {"group_sise": 2}})


# ---- properties -------------------------------------------------------------------------------------------


@st.composite
def moe_layer_sets(draw: st.DrawFn) -> tuple[int, list[int]]:
    is_moe = draw(st.lists(st.booleans(), min_size=1, max_size=40).filter(any))
    return len(is_moe), [layer for layer, moe in enumerate(is_moe) if moe]


@st.composite
def tie_configs(draw: st.DrawFn, num_moe: int) -> TieConfig:
    rule = draw(st.sampled_from(["sqrt", "linear", "none", 2.5]))
    width = draw(st.sampled_from([None, 128]))
    if draw(st.booleans()):
        banks = draw(st.lists(st.integers(-3, 9), min_size=num_moe, max_size=num_moe))
        return TieConfig(banks=banks, lr_divisor=rule, num_tied_experts=width)
    skip_first = draw(st.integers(0, num_moe - 1))
    skip_last = draw(st.integers(0, num_moe - 1 - skip_first))
    pattern = draw(st.sampled_from(["consecutive", "cyclic"]))
    block_size = draw(st.integers(1, 5)) if pattern == "cyclic" else 1
    largest = math.ceil((num_moe - skip_first - skip_last) / block_size)
    return TieConfig(
        group_size=draw(st.integers(1, largest)),
        skip_first=skip_first,
        skip_last=skip_last,
        pattern=pattern,
        block_size=block_size,
        lr_divisor=rule,
        num_tied_experts=width,
    )


@st.composite
def topologies(draw: st.DrawFn) -> TieTopology:
    num_layers, moe_layers = draw(moe_layer_sets())
    return TieTopology.build(draw(tie_configs(len(moe_layers))), num_layers, moe_layers)


@given(topologies())
def test_banks_partition_the_moe_layers(topology):
    users = [layer for bank in topology.banks for layer in bank.layers]
    assert sorted(users) == list(topology.moe_layers)
    for layer, index in enumerate(topology.bank_of_layer):
        assert (index is None) == (layer not in users)
        if index is not None:
            assert layer in topology.bank(layer).layers
            assert topology.bank(layer) is topology.banks[index]


@given(topologies())
def test_owners_come_first_and_in_order(topology):
    owners = [bank.owner for bank in topology.banks]
    assert owners == [min(bank.layers) for bank in topology.banks] == sorted(owners)
    assert [bank.index for bank in topology.banks] == list(range(len(owners)))
    assert [layer for layer in range(topology.num_layers) if topology.is_owner(layer)] == owners


@given(topologies())
def test_pattern(topology):
    tie, moe = topology.tie, topology.moe_layers
    if tie.banks is not None:
        for (one, its_id), (other, other_id) in product(zip(moe, tie.banks, strict=True), repeat=2):
            assert (topology.bank(one) is topology.bank(other)) == (its_id == other_id)
        return
    prelude, coda = moe[: tie.skip_first], moe[len(moe) - tie.skip_last :]
    assert not any(topology.bank(layer).is_tied for layer in (*prelude, *coda))
    middle = moe[tie.skip_first : len(moe) - tie.skip_last]
    assert max(topology.bank(layer).size for layer in middle) == tie.group_size
    for bank in topology.banks:
        positions = [moe.index(layer) for layer in bank.layers]
        steps = {after - before for before, after in pairwise(positions)}
        assert steps <= {tie.block_size}
    # Only the last run may fall short: full banks come first, each run of block_size banks at a time.
    full = len(middle) // (tie.group_size * tie.block_size) * tie.block_size
    sizes = [bank.size for bank in topology.banks if bank.owner in middle]
    assert sizes[:full] == [tie.group_size] * full
    assert len(sizes) - full <= tie.block_size


@given(topologies())
def test_divisor_and_width_use_the_actual_bank(topology):
    for bank in topology.banks:
        layers = len(bank.layers)
        rules = {"sqrt": math.sqrt(layers), "linear": layers, "none": 1, 2.5: 2.5}
        assert topology.lr_divisor(bank) == (rules[topology.tie.lr_divisor] if layers > 1 else 1)
        is_narrow_middle = (
            topology.tie.banks is None
            and topology.tie.group_size == 1
            and topology.tie.skip_first <= bank.index < len(topology.banks) - topology.tie.skip_last
        )
        widened = topology.tie.num_tied_experts if layers > 1 or is_narrow_middle else None
        assert topology.num_experts(bank, 64) == (widened or 64)


@given(topologies())
def test_round_trip_through_json(topology):
    data = topology.to_dict()
    assert json.loads(json.dumps(data)) == data
    restored = TieTopology.from_dict(data)
    assert restored == topology
    assert restored.banks == topology.banks


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"bank_of_layer": [0, 1], "tie": {"group_sise": 2}},
        {"bank_of_layer": [1, 0], "tie": {}},
        {"bank_of_layer": [0, 2], "tie": {}},
        {"bank_of_layer": 3, "tie": {}},
    ],
)
def test_from_dict_refuses_what_it_did_not_write(data):
    with pytest.raises(ConfigError, match="must be what TieTopology"):
        TieTopology.from_dict(data)


def test_bank_is_a_plain_value():
    assert Bank(3, (4, 5)) == Bank(index=3, layers=(4, 5))
    assert (Bank(3, (4, 5)).owner, Bank(3, (4, 5)).size, Bank(3, (4,)).is_tied) == (4, 2, False)
