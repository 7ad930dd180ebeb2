"""The public interface is documented, and its pages build without a warning."""

from __future__ import annotations

import inspect
from pathlib import Path

from tests.api_reference import MODULES, build


def test_pages_have_every_public_name(tmp_path: Path) -> None:
    build(tmp_path)
    for module in MODULES:
        page = (tmp_path / Path(*module.__name__.split("."))).with_suffix(".html").read_text(encoding="utf-8")
        for name in module.__all__:
            assert f'id="{name}"' in page
            assert inspect.getdoc(getattr(module, name)), f"{module.__name__}.{name} has no docstring"
