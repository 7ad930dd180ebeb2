"""The only place that knows which versions of torch, Megatron-Core and DeepSpeed this package is valid for."""

from __future__ import annotations

from contextlib import suppress
from importlib import metadata

import torch
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.installed import constants

# torch: torch.nn.functional.grouped_mm. DeepSpeed: the engine subclass overrides methods of this minor line.
SUPPORTED = {
    "torch": SpecifierSet(">=2.10"),
    "megatron-core": SpecifierSet(">=0.16.1,<0.20"),
    "deepspeed": SpecifierSet(">=0.19.8,<0.20"),
}


def version_problems() -> list[Problem]:
    """The installed packages this project cannot work with; empty when all is well."""
    problems = []
    for package, supported in SUPPORTED.items():
        try:
            installed = installed_version(package)
        except metadata.PackageNotFoundError:
            problems.append(Problem(f"package {package}", None, f"must be installed, version {supported}"))
            continue
        # The base version: containers and source builds carry suffixes such as 2.11.0a0+git.
        if Version(installed).base_version not in supported:
            problems.append(Problem(f"package {package}", installed, f"supported versions are {supported}"))
        elif package == "torch" and not hasattr(torch.nn.functional, "grouped_mm"):
            # A preview build counts as its release, but may have been made before the function was added.
            problems.append(Problem("package torch", installed, "must have torch.nn.functional.grouped_mm"))
    return problems


def installed_version(package: str) -> str:
    """The version that would be imported. Raises `PackageNotFoundError`."""
    if package == "megatron-core":
        # The tree of a script comes before an installed wheel, and needs none.
        with suppress(ModuleNotFoundError):
            return ".".join(map(str, constants("megatron.core.package_info", "MAJOR", "MINOR", "PATCH").values()))
    return metadata.version(package)


def check_versions() -> None:
    """Raise `ConfigError` when torch, Megatron-Core or DeepSpeed is missing or outside its supported range."""
    problems = version_problems()
    if problems:
        raise ConfigError(problems)
