"""The README's commands as they stand there, in a copy of the checkout: in few steps, and but for what is not here."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from megatron_tied.training.config_file import load_config
from megatron_tied.training.launcher import free_port
from tests.data.corpus import make_text
from tests.documents import README, ROOT
from tests.processes import run_to_end

_FEW = "train.steps=4 optimizer.warmup_steps=1 train.eval_every=4 train.eval_steps=1 checkpoint.save_every=2"
# What is typed here in place of what stands there.
_LESS = (
    (r"^bash examples/quickstart.sh$", f"bash examples/quickstart.sh {_FEW}"),
    (r"^(deepspeed .*megatron_tied\.pretrain .*)$", rf"\1 {_FEW}"),
    (r"^deepspeed ", f"deepspeed --master_port {free_port()} "),
    (r"--vocab-size 32000", "--vocab-size 320"),
    (r"code=data/code-held-out data/wiki-held-out", "code=data/mine"),
)
# What needs a network, other hosts, a container engine or more time, by how it begins; and which tests run it.
_NOT_HERE = {
    "bash tests/run.sh": "this",
    ".venv/bin/mypy": "tests/run.sh",
    ".venv/bin/python -m tests.documents": "tests/test_readme.py",
    ".venv/bin/python -m tests.api_reference": "tests/test_api_reference.py",
    "tensorboard": "tests/monitor/test_tensorboard_browser.py",
    "megatron-tied prepare-data --dataset HuggingFaceTB": "tests/data/test_stream.py",
    "megatron-tied lm-eval": "tests/evaluate/test_harness.py",
    "megatron-tied doctor --hostfile": "tests/doctor",
    "deepspeed --hostfile": "tests/cluster",
    "megatron-tied supervise": "tests/supervision",
    "torchrun ... ": "tests/megatron_lm",
    "docker": "tests/docker",
}


def _blocks() -> Iterator[tuple[str, list[str]]]:
    """The commands of every block of shell, with the heading above it."""
    heading = ""
    parts = re.compile(r"^(## [^\n]*|```bash\n.*?```)$", re.MULTILINE | re.DOTALL)
    for part in parts.split(README.read_text(encoding="utf-8")):
        if part.startswith("## "):
            heading = part.removeprefix("## ")
        elif part.startswith("```bash"):
            lines = part.removeprefix("```bash\n").removesuffix("```").replace("\\\n", " ").splitlines()
            yield heading, [bare for line in lines if (bare := re.sub(r"(^|\s+)#.*", "", line).strip())]


BLOCKS = list(_blocks())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with the environment that these tests run in, and with what a reader is taken to have."""
    copy = tmp_path_factory.mktemp("readme") / "checkout"
    left_out = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=left_out)
    (copy / ".venv").mkdir()
    for entry in Path(sys.prefix).iterdir():
        (copy / ".venv" / entry.name).symlink_to(entry)
    for stamp in ("installed", "installed-test"):
        (copy / ".venv" / stamp).unlink(missing_ok=True)
    (copy / ".venv" / "installed").touch()
    # So many that a hundredth of them is left for validation.
    texts = [make_text(60, seed) for seed in range(300)]
    (copy / "corpus").mkdir()
    (copy / "corpus" / "some.txt").write_text("\n".join(texts), encoding="utf-8")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (copy / "more.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (copy / "mine.yaml").write_text(json.dumps(_config_of_mine()))
    (copy / "train.sh").write_text("torchrun pretrain_gpt.py --num-layers 8 --num-experts 8 --hidden-size 64\n")
    return copy


def _config_of_mine() -> dict[str, dict[str, object]]:
    small = {"preset": "olmoe", "scale": "tiny", "num_layers": 8, "hidden_size": 64, "num_attention_heads": 4}
    return {
        "model": {**small, "moe_ffn_hidden_size": 32, "num_moe_experts": 8, "moe_router_topk": 2},
        "tie": {"group_size": 4},
        "data": {"train": "data/mine", "tokenizer": "data/mine.model"},
        "train": {
            **{"run_dir": "runs/mine", "seq_length": 32, "micro_batch_size": 2, "global_batch_size": 4},
            **{"precision": "fp32", "log_every": 1},
        },
    }


@pytest.mark.parametrize(("heading", "commands"), BLOCKS, ids=[heading for heading, _ in BLOCKS])
def test_a_block_runs(heading: str, commands: list[str], checkout: Path) -> None:
    typed = []
    for command in commands:
        if command.startswith(tuple(_NOT_HERE)):
            continue
        for pattern, replacement in _LESS:
            command = re.sub(pattern, replacement, command)
        typed.append(command)
    script = "\n".join(["set -euxo pipefail", 'export PATH="$PWD/.venv/bin:$PATH" DS_ACCELERATOR=cpu', *typed])
    done = run_to_end(["bash", "-c", script], cwd=checkout, env=os.environ, timeout=600)
    assert done.returncode == 0, f"{heading}:\n{done.stdout}"


def test_training_commands_are_right_as_they_stand_there() -> None:
    checked = 0
    for _, commands in BLOCKS:
        for command in commands:
            words = command.split()
            if "megatron_tied.pretrain" in words and "examples/quickstart.yaml" in words:
                overrides = words[words.index("examples/quickstart.yaml") + 1 :]
                assert load_config(ROOT / "examples" / "quickstart.yaml", overrides).problems(world_size=2) == []
                checked += 1
    assert checked


def test_what_is_left_out_is_there() -> None:
    everything = [command for _, commands in BLOCKS for command in commands]
    for beginning in _NOT_HERE:
        assert any(command.startswith(beginning) for command in everything), beginning
