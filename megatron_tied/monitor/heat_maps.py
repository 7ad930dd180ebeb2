"""Pictures of who gets the tokens and which layers agree, small enough to be looked at as thumbnails."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

_DPI = 100
_WIDTH = 4.8  # inches; a thumbnail is some 350 pixels wide, in the Time Series tab 200 high
_INCHES_PER_EXPERT = 0.022
_TITLE_SIZE, _TEXT_SIZE, _SUBTITLE_SIZE = 12, 11, 10
_MOST_LABELS = 16
_OCTAVES = 2  # colours end at a quarter and at four times the mean
_DEAD = -10.0  # below the scale, in octaves
_DEAD_COLOUR = "black"
_LIGHT_TEXT_FROM = 0.6


def load_heat_map(loads: Mapping[str, Sequence[float]], rows: str, step: int) -> Figure:
    """Tokens of each expert, a row for each of `rows` ("layer" or "bank"); rows may differ in length.

    loads: by the number of the layer or bank, in multiples of the row's mean; a number that is None or not finite is
    left blank.
    """
    numbers = sorted(loads, key=int)
    octaves = _octaves([loads[number] for number in numbers])
    width = max(_WIDTH, 1.2 + _INCHES_PER_EXPERT * octaves.shape[1])
    figure = _figure(width, 1.1 + min(4.2, max(0.8, 0.22 * len(numbers))))
    axes = figure.add_subplot()
    picture = axes.imshow(
        octaves, aspect="auto", interpolation="nearest", cmap=_load_colours(), vmin=-_OCTAVES, vmax=_OCTAVES
    )
    axes.set_facecolor("0.85")
    every = math.ceil(len(numbers) / _MOST_LABELS)
    axes.set_yticks(range(0, len(numbers), every), numbers[::every])
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("expert", fontsize=_TEXT_SIZE)
    axes.set_ylabel(rows, fontsize=_TEXT_SIZE)
    axes.tick_params(labelsize=_TEXT_SIZE)
    figure.suptitle(
        f"Tokens per expert by {rows}, step {step:,}\nwhite even · red many · blue few · black none",
        fontsize=_TITLE_SIZE,
    )
    scale = figure.colorbar(picture, ax=axes, pad=0.02)
    scale.set_ticks([-2, -1, 0, 1, 2], labels=["≤ ¼", "½", "1", "2", "≥ 4"], fontsize=_TEXT_SIZE)
    return figure


def agreement_heat_maps(
    matrices: Mapping[str, Sequence[Sequence[float]]],
    layers: Mapping[str, Sequence[int]],
    chance: Mapping[str, float],
    step: int,
) -> Figure:
    """The share of top-k experts that two layers of a tied bank have in common: a matrix for each bank.

    matrices: by bank, layers x layers in 0..1; layers, chance: by bank, the numbers of its layers, and the share that
    is to be expected of independent routers, where it is known.
    """
    banks = sorted(matrices, key=int)
    columns = min(len(banks), max(3, math.ceil(math.sqrt(2 * len(banks)))))
    side = max(1.75, 0.45 * max(map(len, matrices.values())))
    rows = math.ceil(len(banks) / columns)
    figure = _figure(max(_WIDTH, side * columns), 0.6 + (side + 0.2) * rows)
    for place, bank in enumerate(banks, start=1):
        axes = figure.add_subplot(rows, columns, place)
        _draw_agreement(axes, np.asarray(matrices[bank], dtype=float), layers[bank], chance.get(bank))
        by_chance = f", chance {_short(chance[bank])}" if bank in chance else ""
        axes.set_title(f"bank {bank}{by_chance}", fontsize=_SUBTITLE_SIZE)
    figure.suptitle(
        f"Top-k experts that tied layers share, step {step:,}\nwhite chance · dark green all", fontsize=_TITLE_SIZE
    )
    return figure


def image(figure: Figure) -> NDArray[np.uint8]:
    """The pixels of a figure [height, width, 3]."""
    canvas = FigureCanvasAgg(figure)
    # matplotlib leaves its canvas without types.
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    return pixels[..., :3].copy()


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def _load_colours() -> Colormap:
    # Without its dark ends, which look like dead experts.
    return ListedColormap(mpl.colormaps["RdBu_r"](np.linspace(0.12, 0.88, 255))).with_extremes(under=_DEAD_COLOUR)


def _octaves(rows: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """Loads as logarithms to base 2 within the scale of colours [rows, experts]; NaN where a row has no expert."""
    octaves = np.full((len(rows), max(map(len, rows), default=0)), np.nan)
    for filled, row in zip(octaves, rows, strict=True):
        load = np.array(row, dtype=float)
        with np.errstate(divide="ignore", invalid="ignore"):
            filled[: len(row)] = np.where(load == 0, _DEAD, np.clip(np.log2(load), -_OCTAVES, _OCTAVES))
    return octaves


def _draw_agreement(axes: Axes, matrix: NDArray[np.float64], layers: Sequence[int], chance: float | None) -> None:
    lowest = min(chance or 0.0, 0.99)
    axes.imshow(matrix, cmap="Greens", vmin=lowest, vmax=1.0)
    ticks, labels = range(len(layers)), list(map(str, layers))
    axes.set_xticks(ticks, labels)
    axes.set_yticks(ticks, labels)
    axes.tick_params(labelsize=_TEXT_SIZE)
    if len(matrix) > _MOST_LABELS:
        return  # numbers would be too small to read, and take seconds to draw
    for (row, column), value in np.ndenumerate(matrix):
        colour = "white" if (value - lowest) / (1 - lowest) > _LIGHT_TEXT_FROM else "black"
        axes.text(column, row, _short(value), ha="center", va="center", color=colour, fontsize=_TEXT_SIZE)


def _short(share: float) -> str:
    if not math.isfinite(share):
        return "?"
    return f"{share:.2f}".removeprefix("0").removesuffix(".00")
