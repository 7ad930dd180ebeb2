"""Megatron-LM's own `pretrain_gpt.py`, unchanged, through the launcher; and the patched one.

They need trees of Megatron-LM: `MEGATRON_LM_TREES` names a folder that holds them as `core_v0.16.1` and so on. From
0.17 on, Megatron-LM needs Python 3.12.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from megatron_tied.cli.main import main
from megatron_tied.patching.source_tree import apply

_TREES = os.environ.get("MEGATRON_LM_TREES")
pytestmark = [
    pytest.mark.skipif(_TREES is None, reason="MEGATRON_LM_TREES names no folder of Megatron-LM trees"),
    pytest.mark.skipif(find_spec("six") is None, reason="megatron.training needs the package six"),
]
_TIE = ("--moe-tie-group-size", "2", "--moe-tie-skip-first", "1", "--moe-tie-skip-last", "1")
_SHARDED = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
_MODEL = shlex.split(
    """
    --num-layers 6 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 128 --seq-length 32
    --max-position-embeddings 32 --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32
    --moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 0.01 --moe-router-load-balancing-type aux_loss
    --disable-bias-linear --swiglu --normalization RMSNorm --position-embedding-type rope
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --micro-batch-size 2
    --global-batch-size 8 --train-iters 20 --lr 1e-3 --min-lr 1e-4 --lr-warmup-iters 2 --lr-decay-style cosine
    --split 90,5,5 --eval-interval 1000 --eval-iters 1 --log-interval 1 --transformer-impl local
    --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion
    --no-rope-fusion --use-cpu-initialization --distributed-backend gloo --ckpt-format torch_dist --save-interval 10
    --tokenizer-type SentencePieceTokenizer
    """
)
_STEP = re.compile(r"iteration +(\d+)/.*lm loss: (\S+) .*grad norm: (\S+) ")


def _copy_of_tree(tag: str, destination: Path) -> Path:
    if not Path(_TREES, tag).is_dir():
        pytest.skip(f"{tag} is not among the trees")
    if tag > "core_v0.17" and sys.version_info < (3, 12):
        pytest.skip(f"{tag} needs Python 3.12")
    tree = Path(shutil.copytree(Path(_TREES, tag), destination))
    # The compiled dataset helpers: those of the wheel, or what a tree gets by running make.
    helpers = find_spec("megatron.core.datasets.helpers_cpp") if tag == "core_v0.16.1" else None
    if helpers is not None:
        shutil.copy(helpers.origin, tree / "megatron/core/datasets")
    elif subprocess.run(["make", "-C", tree / "megatron/core/datasets"], check=False).returncode:
        pytest.skip("the dataset helpers of the tree need make, a C++ compiler and pybind11")
    return tree


@pytest.fixture(scope="module", params=["core_v0.16.1", "core_v0.17.1", "core_v0.18.2", "core_v0.19.0"])
def tree(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pristine tree."""
    return _copy_of_tree(request.param, tmp_path_factory.mktemp("pristine") / request.param)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A dataset made by `megatron-tied prepare-data`, as Megatron-LM's flags."""
    folder = tmp_path_factory.mktemp("data")
    # A document each: Megatron-LM splits by documents, and waits for ever for a sample of an empty split.
    sources = sorted(map(str, Path(__file__).parents[2].glob("megatron_tied/**/*.py")))
    prefix = folder / "corpus"
    arguments = ["--input", *sources, "--output", str(prefix), "--train-tokenizer", "--vocab-size", "400"]
    assert main(["prepare-data", *arguments]) == 0
    return ["--data-path", str(prefix), "--tokenizer-model", f"{prefix}.model"]


class Run:
    """What one run has printed."""

    def __init__(self, finished: subprocess.CompletedProcess):
        self.output = finished.stdout
        self.code = finished.returncode
        self.steps = {int(step): (float(loss), float(norm)) for step, loss, norm in _STEP.findall(finished.stdout)}


def launch(tree: Path, ranks: int, *flags: str, driver: tuple[str, ...] = ("-m", "megatron_tied.megatron_lm")) -> Run:
    """Run the tree's `pretrain_gpt.py`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    finished = subprocess.run(
        [*command, *driver, "pretrain_gpt.py", *_MODEL, *flags],
        cwd=tree,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return Run(finished)


@pytest.fixture(scope="module")
def tied(tree: Path, data: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A tied run of 20 steps at EP 2, and where it has saved."""
    saved = tmp_path_factory.mktemp("tied")
    run = launch(tree, 2, *data, *_TIE, *_SHARDED, "--expert-model-parallel-size", "2", "--save", str(saved))
    assert run.code == 0, run.output[-4000:]
    return run, saved


def tensors(tree: Path, checkpoint: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors, read by the tree that has written it in a process of its own."""
    code = (
        "import sys, torch; from megatron_tied.platform.training import prepare_training; prepare_training();"
        "from megatron.core.dist_checkpointing.serialization import load_plain_tensors as load;"
        "torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1);"
        "found = load(sys.argv[1]);"
        "torch.save({name: value for name, value in found.items() if torch.is_tensor(value)}, sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, str(checkpoint), str(tmp_path / "tensors")], check=True, cwd=tree)
    return torch.load(tmp_path / "tensors")


def test_an_unmodified_script_trains_tied_and_untied(tree: Path, data: list[str], tied: tuple[Run, Path]) -> None:
    untied = launch(tree, 2, *data, *_SHARDED, "--expert-model-parallel-size", "2")
    for run in (untied, tied[0]):
        assert set(run.steps) == set(range(1, 21)), run.output[-4000:]
        assert run.steps[20][0] < run.steps[1][0] - 0.2
    # What Megatron-LM prints of its own model's size: banks once, in both reports.
    counts = [int(re.search(r"model parallel rank \([0, ]+\): (\d+)", run.output)[1]) for run in (untied, tied[0])]
    # Two followers' local experts: 2 x (64 x 64 + 64 x 32) each.
    assert counts[0] - counts[1] == 2 * 2 * (64 * 64 + 64 * 32)
    memory = [float(re.search(r"weight and optimizer=(\S+) MB", run.output)[1]) for run in (untied, tied[0])]
    # The report of 0.18 and later knows of EP; those before divide all that is not a weight by the DP size of 2.
    per_rank, bytes_each = (2, 18) if tree.name > "core_v0.18" else (4, 6 + 12 / 2)
    saved = 2 * per_rank * (64 * 64 + 64 * 32) * bytes_each
    assert (memory[0] - memory[1]) * 2**20 == pytest.approx(saved, rel=0.05)


def test_a_patched_tree_trains_the_same_bit_for_bit(
    tree: Path, data: list[str], tied: tuple[Run, Path], tmp_path: Path
) -> None:
    patched = Path(shutil.copytree(tree, tmp_path / "tree"))
    apply(patched)
    # Without the launcher's hooks: only what lets Megatron-LM run on a host without CUDA.
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import os, sys; from pathlib import Path; sys.path.insert(0, os.getcwd())\n"
        "from megatron_tied.platform.training import prepare_training; prepare_training()\n"
        "from megatron_tied.megatron_lm.__main__ import run\n"
        "if __name__ == '__main__':\n"
        "    run(Path(sys.argv[1]), sys.argv[1:])\n"
    )
    flags = [*data, *_TIE, *_SHARDED, "--expert-model-parallel-size", "2", "--save", str(tmp_path / "saved")]
    run = launch(patched, 2, *flags, driver=(str(driver),))
    assert run.steps == tied[0].steps, run.output[-4000:]
    expected, found = (tensors(tree, path / "iter_0000020", tmp_path) for path in (tied[1], tmp_path / "saved"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    owners = {
        name.split(".")[2] for name in expected if re.fullmatch(r"decoder\.layers\.\d+\.mlp\.experts\..*weight", name)
    }
    assert owners == {"0", "1", "3", "5"}


def test_a_checkpoint_goes_on_at_its_own_and_at_another_expert_parallel_size(
    tree: Path, data: list[str], tied: tuple[Run, Path], tmp_path: Path
) -> None:
    run, saved = tied
    half = Path(shutil.copytree(saved, tmp_path / "half"))
    (half / "latest_checkpointed_iteration.txt").write_text("10")
    resumed = launch(tree, 2, *data, *_TIE, *_SHARDED, "--expert-model-parallel-size", "2", "--load", str(half))
    assert set(resumed.steps) == set(range(11, 21)), resumed.output[-4000:]
    for step in (11, *range(13, 21)):  # of the second step it logs another figure after a resume, untied too
        assert resumed.steps[step] == pytest.approx(run.steps[step], rel=1e-5)
    # Megatron-LM keeps optimizer and RNG states by EP size when it is 1.
    elsewhere = launch(tree, 1, *data, *_TIE, "--no-load-optim", "--no-load-rng", "--load", str(half))
    assert elsewhere.steps[11] == pytest.approx(run.steps[11], rel=1e-3), elsewhere.output[-4000:]
    refused = launch(tree, 2, *data, "--expert-model-parallel-size", "2", "--load", str(half))
    assert refused.code != 0
    assert "expert banks by layer = 'untied': must be that of the checkpoint, 0,1,1,2,2,3" in refused.output


def test_pipelines_of_a_script(tree: Path, data: list[str]) -> None:
    banks = ("--moe-tie-banks", "0,1,2,2,3,4", "--pipeline-model-parallel-size", "2")
    aligned = launch(tree, 2, *data, *banks)
    assert "the pipeline is cut between tie groups, layers 0-1 | 2-5" in aligned.output
    assert aligned.steps[20][0] < aligned.steps[1][0] - 0.2
    copies = launch(tree, 2, *data, *banks, "--moe-tie-pipeline", "allreduce", *_SHARDED)
    assert copies.steps[20][0] < copies.steps[1][0] - 0.2, copies.output[-4000:]
    refused = launch(tree, 2, *data, *banks, "--pipeline-model-parallel-layout", "Et*3|t*3L")
    assert refused.code != 0
    assert refused.output.count("--pipeline-model-parallel-layout 'Et*2|t*4L' works (layers 0-1 | 2-5)") == 1
