"""Figures as SVG that stands in an HTML page and takes the page's colours."""

from __future__ import annotations

import io
import re

import matplotlib as mpl
from matplotlib.figure import Figure

# Stand for colours of the page, which differ between light and dark; no chart draws with them otherwise.
INK, GRID, CARD = "#0a0b0c", "#0d0e0f", "#f0f1f2"
_PAGE_COLOURS = {INK: "currentColor", GRID: "var(--grid)", CARD: "var(--card)"}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_PIXELS_PER_POINT = 4 / 3


def inline_svg(figure: Figure, name: str) -> str:
    """An <svg> element whose text is text. `name` must differ between the figures of a page: ids begin with it."""
    stream = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(stream, format="svg", facecolor="none", metadata=_NO_METADATA)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    for colour, of_page in _PAGE_COLOURS.items():
        text = text.replace(colour, of_page)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)


def width_pixels(figure: Figure) -> int:
    """The width of a figure's SVG at its natural size, in CSS pixels."""
    return round(figure.get_figwidth() * 72 * _PIXELS_PER_POINT)
