"""Runs of elements as rectangles: every element once, in the place where it stands."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_tied.checkpoint.layout import Block, model_layout
from megatron_tied.layers.moe_layer import tied_layers
from tests.tiny_model import TIE, build

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@st.composite
def shapes_and_cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[int]]:
    shape = draw(SHAPES)
    numel = math.prod(shape)
    return shape, sorted({0, numel, *draw(st.lists(st.integers(0, numel), max_size=4))})


@given(shapes_and_cuts())
def test_a_cut_block_is_put_together_from_its_rectangles(case: tuple[tuple[int, ...], list[int]]) -> None:
    shape, cuts = case
    values = torch.arange(math.prod(shape))
    block = Block("w", shape, (0,) * len(shape), shape, start=7)
    whole = torch.full(shape, -1)
    for start, stop in pairwise(cuts):
        found = list(block.rectangles(start + 7, stop + 7))
        assert len(found) <= 2 * len(shape) - 1
        for offsets, sizes, begin in found:
            place = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
            assert (whole[place] == -1).all(), "an element came twice"
            whole[place] = values[begin - 7 : begin - 7 + math.prod(sizes)].view(sizes)
    assert torch.equal(whole, values.view(shape))


def test_elements_of_other_blocks_are_left_alone() -> None:
    block = Block("w", (4, 2), (2, 0), (2, 2), start=4)
    assert list(block.rectangles(0, 4)) == []
    assert list(block.rectangles(0, 6)) == [((2, 0), (1, 2), 4)]
    assert list(block.rectangles(5, 100)) == [((2, 1), (1, 1), 5), ((3, 0), (1, 2), 6)]


@pytest.mark.parametrize("backend", ["grouped", "sequential"])
@pytest.mark.usefixtures("one_process")
def test_a_bank_is_named_once_and_alike_by_every_backend(backend: str) -> None:
    layout = model_layout(build(expert_backend=backend))
    blocks = [block for parameter in layout.values() for block in parameter.blocks]
    experts = {block.tensor: block.shape for block in blocks if ".experts." in block.tensor}
    assert experts == {
        f"decoder.layers.{owner}.mlp.experts.{kind}": (8, *shape)
        for owner in (0, 1, 4)
        for kind, shape in (("gate", (16, 32)), ("up", (16, 32)), ("down", (32, 16)))
    }


@pytest.mark.usefixtures("one_process")
def test_blocks_hold_the_matrices_of_each_expert() -> None:
    model = build()
    parameters = dict(model.named_parameters())
    name = "decoder.layers.1.mlp.experts.fc1_weight"
    experts = list(tied_layers(model))[1].experts
    for block in model_layout(model)[name].blocks:
        index = block.offsets[0]
        gate, up = experts.fc1_weight[index].chunk(2)
        expected = {"gate": gate, "up": up}[block.tensor.rpartition(".")[2]]
        found = parameters[name].detach().flatten()[block.start : block.start + math.prod(block.sizes)]
        assert torch.equal(found.view(block.sizes)[0], expected)


@pytest.mark.usefixtures("one_process")
def test_expert_parameters_without_a_place_are_refused() -> None:
    model = build(TIE, expert_backend="sequential")
    experts = next(tied_layers(model)).experts
    experts.local_experts[0].linear_fc1.register_parameter("bias", torch.nn.Parameter(torch.zeros(32)))
    with pytest.raises(TypeError, match=r"linear_fc1\.bias: a checkpoint cannot hold this expert parameter"):
        model_layout(model)
