"""The reference of the public interface, as HTML pages made from its docstrings.

`python -m tests.api_reference` writes it to build/api; what a docstring or an annotation says wrong is an error.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pdoc

import megatron_tied
from megatron_tied import megatron_lm
from megatron_tied.platform import prepare

MODULES = (megatron_tied, megatron_lm)


def build(directory: Path) -> None:
    """Writes a page for each module of `MODULES`. Raises Warning at the first thing that pdoc finds wrong."""
    prepare()  # on a host without CUDA, and quietly
    for module in MODULES:
        for name in module.__all__:
            getattr(module, name)  # loaded when first asked for, which pdoc doesn't
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc.pdoc(*(module.__name__ for module in MODULES), output_directory=directory)


if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else "build/api"))
