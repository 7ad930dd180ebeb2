"""What people install: the wheel has all that the commands need, wherever they are called from, and nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

import megatron_tied
from tests.convert.hf_models import save
from tests.data.corpus import make_text, write_jsonl
from tests.patching.source_trees import make_tree
from tests.report.synthetic_runs import TIED, Synthetic

ROOT = Path(__file__).parents[1]
# Its own --help needs the harness.
NOT_OURS = "lm-eval"


class Installed(NamedTuple):
    """An environment with the wheel and, by path, the packages that it needs, and a directory to work in."""

    wheel: Path
    python: Path
    directory: Path

    def run(self, *command: str | Path, code: int = 0) -> str:
        """Both streams of a command of the environment, which must end with `code`."""
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        env |= {"PATH": f"{self.python.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*map(str, command)], cwd=self.directory, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    directory = tmp_path_factory.mktemp("wheel")
    for path in tracked():
        (directory / "source" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, directory / "source" / path)
    # The wheel is made from the source distribution.
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", directory, directory / "source"]
    done = subprocess.run(build, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    (wheel,) = directory.glob("*.whl")
    environment = directory / "environment"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*install, "--disable-pip-version-check", wheel], check=True)
    # Only a directory: links to checkouts in it are not followed.
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (directory / "elsewhere").mkdir()
    return Installed(wheel, python, directory / "elsewhere")


def tracked() -> list[str]:
    """The files of the checkout that git knows or would know."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [path for path in found if (ROOT / path).is_file()]


def test_its_files_are_the_package_and_the_patches(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as wheel:
        found = {path for path in wheel.namelist() if ".dist-info/" not in path}
        (metadata,) = (wheel.read(path).decode() for path in wheel.namelist() if path.endswith("/METADATA"))
        licenses = [wheel.read(path) for path in wheel.namelist() if path.endswith(".dist-info/licenses/LICENSE")]
    expected = {path for path in tracked() if path.startswith("megatron_tied/")}
    expected |= {f"megatron_tied/{path}" for path in tracked() if path.startswith("patches/")}
    assert found == expected - {"megatron_tied/patches/README.md"}
    assert "megatron_tied/py.typed" in found
    assert f"\nVersion: {megatron_tied.__version__}\n" in metadata
    assert (ROOT / "README.md").read_text() in metadata
    assert licenses == [(ROOT / "LICENSE").read_bytes()]


def test_every_command_explains_itself(installed: Installed) -> None:
    code = "import megatron_tied; print(megatron_tied.__file__)"
    assert installed.run("python", "-c", code).startswith(str(installed.python.parents[1]))
    assert installed.run("megatron-tied", "--version") == f"megatron-tied {megatron_tied.__version__}\n"
    names = re.findall(r"^    ([a-z-]+) ", installed.run("megatron-tied", "--help"), re.MULTILINE)
    assert {"generate", "convert", NOT_OURS} < set(names)
    code = (
        "import sys\n"
        "from megatron_tied.cli.main import main\n"
        "for name in sys.argv[1:]:\n"
        "    try: main([name, '--help'])\n"
        "    except SystemExit as end: assert end.code == 0, name\n"
    )
    told = installed.run("python", "-c", code, *(name for name in names if name != NOT_OURS))
    assert told.count("usage: ") == len(names) - 1
    assert "--config" in installed.run("python", "-m", "megatron_tied.pretrain", "--help")


def test_what_needs_files_of_the_package_finds_them(installed: Installed) -> None:
    """Hardware for plans, stored patches, the template of reports, the code beside an exported model."""
    command, directory = "megatron-tied", installed.directory
    plan = ("plan", "--arch", "olmoe", "--scale", "tiny", "--world-size", "8", "--hardware", "h200")
    assert "8 x h200, " in installed.run(command, *plan)
    script = shutil.copy(ROOT / "tests/patching/cases/command.sh", directory)
    assert "tie" in installed.run(command, "patch", script, "--output", directory / "patched.sh")
    told = installed.run(command, "patch", "--megatron-lm", make_tree(directory / "tree"), "--check", code=2)
    assert "0.16.1" in told
    Synthetic(TIED, steps=60).write(directory / "run")
    installed.run(command, "report", "run")
    assert "<svg" in (directory / "run" / "report.html").read_text()


def test_data_and_conversions(installed: Installed) -> None:
    command, directory = "megatron-tied", installed.directory
    write_jsonl(directory / "texts.jsonl", [make_text(300, seed) for seed in range(8)])
    tokenizer = ("--train-tokenizer", "--vocab-size", "320")
    installed.run(command, "prepare-data", "--input", "texts.jsonl", "--output", "data", "--workers", "1", *tokenizer)
    assert (directory / "data.bin").stat().st_size
    save("olmoe", directory / "hf")
    options = ("--tie-group-size", "2", "--tokenizer", "none", "--no-verify")
    places = ("--input", "hf", "--output", "compact")
    installed.run(command, "convert", "--from", "hf", "--to", "hf-compact", *places, *options)
    assert (directory / "compact" / "modeling_megatron_tied.py").is_file()
