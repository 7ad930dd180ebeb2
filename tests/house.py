"""The rooms of the package, floor by floor, as the README's architecture section shows them.

Floors stand in pyproject.toml, where `lint-imports` reads them; a room's purpose is the first line of its docstring.
"""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import grimp
import networkx

ROOT = Path(__file__).parents[1]
PACKAGE = "megatron_tied"


def floors() -> list[list[str]]:
    """The rooms of each floor, from the top."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = next(contract["layers"] for contract in settings["contracts"] if contract["type"] == "layers")
    return [floor.split(" | ") for floor in layers]


def stands_on() -> dict[str, list[str]]:
    """The rooms below each room that no other room between them leads to."""
    graph = grimp.build_graph(PACKAGE, exclude_type_checking_imports=True, cache_dir=None)
    rooms = networkx.DiGraph()
    rooms.add_nodes_from(room for floor in floors() for room in floor)
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            room, below = _room(module), _room(imported)
            if room and below and room != below and not module.endswith(".__main__"):
                rooms.add_edge(room, below)
    nearest = networkx.transitive_reduction(rooms)
    return {room: sorted(nearest[room]) for room in rooms}


def table() -> str:
    """Markdown: a row for each room, from the top floor down."""
    below = stands_on()
    lines = ["| floor | room | what | stands on |", "|---|---|---|---|"]
    for number, rooms in zip(range(len(floors()), 0, -1), floors(), strict=True):
        for room in rooms:
            on = ", ".join(f"`{name}`" for name in below[room])
            lines.append(f"| {number} | `{room}` | {_purpose(room)} | {on} |")
    return "\n".join(lines) + "\n"


def _room(module: str) -> str | None:
    _, *inside = module.split(".")
    return inside[0] if inside else None


def _purpose(room: str) -> str:
    place = ROOT / PACKAGE / room
    source = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8")))
    assert docstring, f"{source} has no docstring"
    return docstring.splitlines()[0].rstrip(".")
