"""What is generated in documents: `python -m tests.documents` writes it, `tests/test_readme.py` finds what is old."""

from __future__ import annotations

from pathlib import Path

from tests import config_reference, house, supported, topologies

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CONFIG_REFERENCE = ROOT / "examples" / "config.md"
_BLOCKS = {"house": house.table, "supported": supported.table, "topologies": topologies.table}


def documents() -> dict[Path, str]:
    """The text of every document that is generated, or in part, as it should be."""
    readme = README.read_text(encoding="utf-8")
    for name, block in _BLOCKS.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        before, rest = readme.split(begin)
        _, after = rest.split(end)
        readme = before + begin + block() + end + after
    return {README: readme, CONFIG_REFERENCE: config_reference.text()}


if __name__ == "__main__":
    for path, text in documents().items():
        path.write_text(text, encoding="utf-8")
