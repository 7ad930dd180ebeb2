"""`megatron-tied checkpoint inspect`: a table from the manifest alone, however large the files are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tied.checkpoint.manifest import Chunk, File, Manifest, Tensor
from megatron_tied.cli.main import main

GIGABYTE = 1 << 30
FILES = [f"rank_{rank:05d}.safetensors" for rank in range(5)]


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A checkpoint of 5 GiB whose files are holes, of eight layers in three banks."""
    directory = tmp_path / "step_00001000"
    directory.mkdir()
    for name in FILES:
        (directory / name).touch()
        os.truncate(directory / name, GIGABYTE)

    def tensor(*shape: int) -> Tensor:
        rows = shape[0] // len(FILES)
        places = [[index * rows, *(0 for _ in shape[1:])] for index in range(len(FILES))]
        return Tensor(
            "float32", list(shape), [Chunk(f, o, [rows, *shape[1:]]) for f, o in zip(FILES, places, strict=True)]
        )

    banks = {0: [0], 1: [1, 2, 3, 4, 5, 6], 7: [7]}
    tensors = {
        f"{state}/decoder.layers.{owner}.mlp.experts.{kind}": tensor(40, 64, 32)
        for owner in banks
        for kind in ("gate", "up", "down")
        for state in ("weight", "exp_avg", "exp_avg_sq")
    }
    tensors["weight/output_layer.weight"] = tensor(500, 32)
    tensors["rng/rank_00000/host"] = Tensor("uint8", [5056], [Chunk(FILES[0], [0], [5056])])
    Manifest(
        step=1000,
        consumed_samples=256000,
        world_size=5,
        software="megatron-tied 1",
        run={
            "parallel": {"expert_model_parallel_size": 5},
            "train": {"steps": 2000, "precision": "bf16"},
            "deepspeed": {"zero_optimization": {"stage": 2}},
        },
        trainer={"banks": list(banks.values())},
        files={name: File(GIGABYTE, "0" * 64) for name in FILES},
        tensors=tensors,
    ).write(directory)
    return directory


def test_the_table(large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "inspect", str(large)]) == 0
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "step 1,000 of 2,000, 256,000 samples consumed",
        "written by 5 processes, expert_model_parallel_size 5, ZeRO 2, bf16",
        # 40 experts x 3 matrices x 64 x 32 elements x 3 states x 4 bytes
        f"1 decoder.layers.1 1, 2, 3, 4, 5, 6 40 64 x 32 float32 {40 * 3 * 64 * 32 * 3 * 4:,}",
        f"decoder.layers.7.mlp.experts.down 40 x 64 x 32 float32 5 exp_avg, exp_avg_sq {40 * 64 * 32 * 3 * 4:,}",
        f"output_layer.weight 500 x 32 float32 5 {500 * 32 * 4:,}",
        f"rank_00004.safetensors {GIGABYTE:,} {'0' * 64}",
        "train: {steps: 2000, precision: bf16}",
    ):
        assert line in shown, "\n".join(shown)


def test_it_takes_little_memory(large: Path) -> None:
    # Not getrusage: Linux hands the parent's peak on to what it starts.
    code = (
        "import sys; from megatron_tied.cli.main import main; main(sys.argv[1:]); assert 'torch' not in sys.modules; "
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    command = [sys.executable, "-c", code, "checkpoint", "inspect", str(large)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kilobytes = int(shown.splitlines()[-1])
    assert kilobytes < 500_000


def test_a_file_that_is_not_there(large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (large / FILES[3]).unlink()
    assert main(["checkpoint", "inspect", str(large)]) == 2
    assert f"{FILES[3]}: is missing: No such file or directory" in capsys.readouterr().err


def test_a_run_without_a_checkpoint_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "metrics.jsonl").write_text("")
    assert main(["checkpoint", "inspect", str(tmp_path)]) == 2
    assert f"is not sound: {tmp_path}: is a run without a checkpoint so far" in capsys.readouterr().err
