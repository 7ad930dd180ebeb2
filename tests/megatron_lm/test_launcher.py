"""The launcher, on scripts that are not Megatron-LM's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tied.bad_input import tell_once
from megatron_tied.errors import ConfigError, Problem
from megatron_tied.megatron_lm import hooks


def launch(*arguments: str, cwd: Path, rank: int = 0) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "megatron_tied.megatron_lm", *arguments],
        cwd=cwd,
        env={**os.environ, "RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "usage: torchrun ... -m megatron_tied.megatron_lm SCRIPT.py"),
        (("--num-layers", "2"), "usage: torchrun"),
        (("missing.py",), "missing.py: no such file"),
        (("alone.py",), "script = 'alone.py': must be a script of a Megatron-LM tree"),
        (("--local-rank=1", "alone.py"), "script = 'alone.py': must be a script of a Megatron-LM tree"),
    ],
)
def test_what_is_no_script_of_megatron_lm_is_told(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    (tmp_path / "alone.py").write_text("raise SystemExit('must not run')\n")
    ended = launch(*arguments, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert message in ended.stderr


def test_a_script_is_the_main_module_with_its_own_arguments_and_its_trees_packages(tmp_path: Path) -> None:
    # A tree with as much of Megatron-LM as the launcher touches on a host without CUDA; none of its functions is there.
    training = tmp_path / "tree/megatron/training"
    training.mkdir(parents=True)
    for name in ("__init__", "initialize", "training", "arguments"):
        (training / f"{name}.py").write_text("")
    (tmp_path / "tree/pretrain.py").write_text(
        "import json, sys, megatron.training\n"
        "if __name__ == '__main__':\n"
        "    print(json.dumps([sys.argv, megatron.training.__file__, sys.modules['__main__'].__file__]))\n"
    )
    ended = launch("--local-rank=1", "tree/pretrain.py", "--num-layers", "2", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    argv, package, main = json.loads(ended.stdout.splitlines()[-1])
    assert argv == ["tree/pretrain.py", "--num-layers", "2", "--local-rank=1"]
    assert Path(package) == training / "__init__.py"
    assert main == "tree/pretrain.py"


def test_a_hook_wraps_once_and_keeps_the_functions_name() -> None:
    def _add_moe_args(parser: object) -> object:
        return parser

    once = hooks.with_tie_arguments(_add_moe_args)
    assert once.__name__ == "_add_moe_args"
    assert hooks.is_hooked(once)
    assert hooks.with_tie_arguments(once) is once
    assert all(hasattr(hooks, hook.wrapper) for hook in hooks.HOOKS)


@pytest.mark.parametrize("rank", [0, 3])
def test_what_one_rank_alone_finds_is_told_by_it(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    waited = []
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr("time.sleep", waited.append)
    assert tell_once(ConfigError(Problem("a", 1, "must be 2"))) == 2
    assert "a = 1: must be 2" in capsys.readouterr().err
    assert bool(waited) is (rank != 0)
