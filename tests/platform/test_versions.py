"""Which installed versions are accepted."""

import re
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.specifiers import SpecifierSet

from megatron_tied.errors import ConfigError
from megatron_tied.platform import versions


def installed(monkeypatch: pytest.MonkeyPatch, **found: str) -> None:
    """Pretend that these packages (dashes as underscores) are installed, and no others, nor a Megatron-LM tree."""

    def version(package: str) -> str:
        if package.replace("-", "_") not in found:
            raise metadata.PackageNotFoundError(package)
        return found[package.replace("-", "_")]

    def no_tree(module: str, *names: str) -> None:
        raise ModuleNotFoundError(module)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(versions, "constants", no_tree)


def test_this_environment_is_supported():
    assert versions.version_problems() == []
    versions.check_versions()


@pytest.mark.parametrize("torch", ["2.10.0", "2.13.0+cpu", "2.11.0a0+git1234", "2.10.0a0+nv25.11"])
def test_local_and_preview_builds_count_as_their_release(monkeypatch, torch):
    installed(monkeypatch, torch=torch, megatron_core="0.17.0rc0", deepspeed="0.19.8+abc")
    assert versions.version_problems() == []


def test_a_preview_build_from_before_grouped_mm_is_refused(monkeypatch):
    installed(monkeypatch, torch="2.10.0a0+nv25.11", megatron_core="0.16.1", deepspeed="0.19.8")
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    [problem] = versions.version_problems()
    assert (problem.field, problem.value) == ("package torch", "2.10.0a0+nv25.11")
    assert "grouped_mm" in problem.valid


def test_a_script_tree_counts_before_an_installed_wheel(tmp_path, monkeypatch):
    core = tmp_path / "megatron/core"
    core.mkdir(parents=True)
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 99\nPATCH = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    [problem] = versions.version_problems()
    assert (problem.field, problem.value) == ("package megatron-core", "0.99.3")


def test_every_wrong_package_is_named_with_what_is_supported(monkeypatch):
    installed(monkeypatch, torch="2.9.1", megatron_core="0.20.0")
    with pytest.raises(ConfigError) as caught:
        versions.check_versions()
    assert [(problem.field, problem.value) for problem in caught.value.problems] == [
        ("package torch", "2.9.1"),
        ("package megatron-core", "0.20.0"),
        ("package deepspeed", None),
    ]
    assert ">=2.10" in caught.value.problems[0].valid
    assert "must be installed" in caught.value.problems[2].valid


def test_the_ranges_are_those_that_setup_py_asks_for():
    setup = (Path(__file__).parents[2] / "setup.py").read_text()
    asked = {name: SpecifierSet(range_) for name, range_ in re.findall(r'"([\w-]+)(>=[^"]+)"', setup)}
    assert {name: asked[name] for name in versions.SUPPORTED} == versions.SUPPORTED
