"""Pixels of heat maps: what is even, loaded, starved, dead and not there can be told apart."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from megatron_tied.monitor.heat_maps import agreement_heat_maps, image, load_heat_map


def colour(figure: Figure, row: int, column: int, axes: int = 0) -> np.ndarray:
    """The colour drawn at a corner of a cell, where no text is, in 0..1."""
    pixels = image(figure)
    x, y = figure.axes[axes].transData.transform((column - 0.4, row - 0.4))
    return pixels[pixels.shape[0] - 1 - round(y), round(x)] / 255


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


LOADS = {"10": [1.0, 4.0, 0.25, 0.0], "9": [1.0, 2.0, 0.5, 0.001, 9.0, 1.0], "3": [1.0] * 4}


def test_colours_of_loads():
    figure = load_heat_map(LOADS, "layer", 300)
    even, loaded, starved, dead = (colour(figure, 2, column) for column in range(4))
    assert even == pytest.approx([0.97] * 3, abs=0.02)
    assert loaded[0] > loaded[2] + 0.4
    assert starved[2] > starved[0] + 0.4
    assert dead == pytest.approx([0, 0, 0])
    # A load below the scale is not a dead expert.
    assert colour(figure, 1, 3) == pytest.approx(starved)
    assert colour(figure, 1, 4) == pytest.approx(loaded)


def test_twice_and_half_the_mean_are_as_far_from_even():
    octaves = load_heat_map(LOADS, "layer", 300).axes[0].images[0].get_array()
    assert octaves[1, :3].tolist() == [0.0, 1.0, -1.0]


def test_rows_are_in_the_order_of_their_numbers():
    figure = load_heat_map(LOADS, "layer", 300)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["3", "9", "10"]


def test_an_expert_that_a_row_does_not_have_and_one_that_is_not_known():
    figure = load_heat_map({"0": [1.0, None, 1.0], "1": [1.0] * 4}, "bank", 1)
    assert colour(figure, 0, 1) == pytest.approx(to_rgb("0.85"), abs=0.01)
    assert colour(figure, 0, 3) == pytest.approx(to_rgb("0.85"), abs=0.01)


def test_many_layers_and_experts_stay_readable():
    figure = load_heat_map({str(layer): [1.0] * 256 for layer in range(61)}, "layer", 12_300)
    height, width, _ = image(figure).shape
    box = figure.axes[0].get_window_extent()
    assert box.width > 2 * 256
    assert box.height > 5 * 61
    assert (width, height) < (800, 600)
    assert len(figure.axes[0].get_yticklabels()) == 16
    assert "by layer, step 12,300" in figure.get_suptitle()


def test_title_names_the_colours():
    assert "white even · red many · blue few · black none" in load_heat_map(LOADS, "bank", 1).get_suptitle()


AGREEMENT = {"2": [[1.0, 0.25], [0.25, 1.0]], "11": [[1.0, 0.9, 0.5], [0.9, 1.0, 0.75], [0.5, 0.75, 1.0]]}
LAYERS = {"2": (3, 4), "11": (20, 30, 40)}


def test_agreement_by_bank():
    figure = agreement_heat_maps(AGREEMENT, LAYERS, {"2": 0.25}, 300)
    first, second = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["bank 2, chance .25", "bank 11"]
    assert [label.get_text() for label in second.get_yticklabels()] == ["20", "30", "40"]
    assert [text.get_text() for text in first.texts] == ["1", ".25", ".25", "1"]
    assert first.images[0].get_clim() == (0.25, 1.0)
    assert second.images[0].get_clim() == (0.0, 1.0)
    same, at_chance = colour(figure, 0, 0), colour(figure, 0, 1)
    assert at_chance == pytest.approx([0.97, 0.99, 0.96], abs=0.02)
    assert same.sum() < 1


def test_text_is_seen_on_its_cell():
    figure = agreement_heat_maps(AGREEMENT, LAYERS, {}, 300)
    colours = {text.get_text(): text.get_color() for text in figure.axes[1].texts}
    assert colours == {"1": "white", ".90": "white", ".75": "white", ".50": "black"}


@pytest.mark.filterwarnings("error")
def test_agreement_that_is_not_known():
    assert "?" in texts(agreement_heat_maps({"0": [[1.0, None], [None, 1.0]]}, {"0": (0, 1)}, {"0": 1.0}, 1))


@pytest.mark.parametrize(("banks", "layers"), [(1, 2), (3, 2), (14, 4), (29, 2), (2, 12)])
def test_nothing_overlaps_or_is_cut_off(banks, layers):
    numbers = [str(bank) for bank in range(banks)]
    matrix = np.full((layers, layers), 0.5).tolist()
    figure = agreement_heat_maps(
        dict.fromkeys(numbers, matrix), dict.fromkeys(numbers, range(50, 50 + layers)), dict.fromkeys(numbers, 0.03), 1
    )
    height, width, _ = image(figure).shape
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert all(box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1 for box in boxes)
    assert not any(one.overlaps(other) for one in boxes for other in boxes if one is not other)


def test_pixels_are_rgb_bytes():
    pixels = image(load_heat_map(LOADS, "bank", 1))
    assert (pixels.dtype, pixels.ndim, pixels.shape[2]) == (np.uint8, 3, 3)


def test_neither_pyplot_nor_torch_is_needed():
    code = "import sys, megatron_tied.monitor.heat_maps; print({'torch', 'matplotlib.pyplot'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
