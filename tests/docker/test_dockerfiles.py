"""Both Dockerfiles: clean to a linter, and true to this repository."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

from megatron_tied.cli.main import main
from megatron_tied.platform.versions import SUPPORTED
from tests.docker.dockerfile import DOCKERFILES, ROOT, Dockerfile

each = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)


@each
def test_lints_clean(path: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "--no-color", path], stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@each
def test_every_build_argument_has_a_default_and_a_use(path: Path) -> None:
    file = Dockerfile.read(path)
    text = "\n".join(value for name, value in file.instructions if name != "ARG")
    for name, default in file.arguments.items():
        assert default, name
        assert f"${{{name}}}" in text, name
    assert set(re.findall(r"\$\{(\w+)\}", text)) - set(file.arguments) <= {"PATH", "PIP_CONSTRAINT"}


@each
def test_an_argument_stands_before_its_first_use(path: Path) -> None:
    seen: set[str] = set()
    file = Dockerfile.read(path)
    for name, value in file.instructions:
        if name == "ARG":
            seen.add(value.partition("=")[0])
        for used in set(re.findall(r"\$\{(\w+)\}", value)) & set(file.arguments):
            assert used in seen, f"{used} in {name} {value}"
        if name == "FROM":
            seen.clear()  # what stands before FROM is known to FROM alone


@each
def test_what_is_copied_is_here(path: Path) -> None:
    for source in Dockerfile.read(path).copied():
        assert (ROOT / source).exists(), source


@each
def test_what_setup_py_reads_is_copied(path: Path) -> None:
    # The package directories, and what it opens by name.
    setup = (ROOT / "setup.py").read_text()
    read = {"setup.py", "megatron_tied", "patches", *re.findall(r'/ "([\w.]+)"\)\.read_text', setup)}
    assert "README.md" in read
    assert read <= set(Dockerfile.read(path).copied())


@each
def test_ends_as_a_numbered_user_who_is_not_root(path: Path) -> None:
    file = Dockerfile.read(path)
    user = file.values("USER")[-1]
    assert user.isdigit()
    assert int(user) > 0
    created = re.compile(rf'useradd --no-log-init --create-home (--non-unique )?--uid "{user}" trainer ')
    assert any(created.match(run) for run in file.values("RUN"))
    after = file.instructions[[name for name, _ in file.instructions].index("USER") :]
    assert {name for name, _ in after} == {"USER", "HEALTHCHECK", "ENTRYPOINT", "CMD"}


def test_the_user_may_have_the_number_of_one_of_the_bases() -> None:
    file = Dockerfile.read(DOCKERFILES[0])
    assert any("useradd " in run and " --non-unique " in run for run in file.values("RUN"))
    # Which of the two a number stands for is not ours to say.
    assert "HOME=/home/trainer" in file.values("ENV")


@each
def test_the_versions_are_supported_ones(path: Path) -> None:
    arguments = Dockerfile.read(path).arguments
    for package in ("torch", "megatron-core", "deepspeed"):
        name = f"{package.upper().replace('-', '_')}_VERSION"
        if package == "torch" and name not in arguments:
            continue  # the base has it
        assert Version(arguments[name]) in SUPPORTED[package]


def test_both_images_have_the_same_packages() -> None:
    gpu, cpu = (Dockerfile.read(path) for path in DOCKERFILES)
    for name in ("MEGATRON_CORE_VERSION", "DEEPSPEED_VERSION", "USER_ID"):
        assert gpu.arguments[name] == cpu.arguments[name]
    assert gpu.copied() == cpu.copied()


def test_the_cpu_image_has_the_torch_of_the_quickstart() -> None:
    torch = Dockerfile.read(DOCKERFILES[1]).arguments["TORCH_VERSION"]
    assert f'"torch=={torch}"' in (ROOT / "examples" / "setup_venv.sh").read_text()


@each
def test_the_default_command_is_ours(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = Dockerfile.read(path).exec_form("CMD")
    assert program == "megatron-tied"
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 0
    assert "prepare-data" in capsys.readouterr().out
