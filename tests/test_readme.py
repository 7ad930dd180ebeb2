"""What the README says is what is tested and what is there."""

from __future__ import annotations

import re

from omegaconf import OmegaConf

from megatron_tied.training.config_file import parse_config
from tests.documents import README, documents


def test_what_is_generated_is_up_to_date() -> None:
    for path, text in documents().items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run python -m tests.documents"


def test_the_config_in_the_readme_is_that_of_quickstart() -> None:
    text = README.read_text(encoding="utf-8")
    shown = next(block for block in re.findall(r"```yaml\n(.*?)```", text, re.S) if "model:" in block)
    quickstart = (README.parent / "examples" / "quickstart.yaml").read_text(encoding="utf-8")
    in_readme, in_file = (parse_config(OmegaConf.to_container(OmegaConf.create(text))) for text in (shown, quickstart))
    assert in_readme == in_file


def test_the_files_the_readme_links_to_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8")):
        assert (README.parent / target).exists(), target
