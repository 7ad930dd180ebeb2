"""Bad input: exit code 2, one line per problem, told once, soon, and before anything is made."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from deepspeed.accelerator import get_accelerator

from megatron_tied import ConfigError, pretrain
from megatron_tied.training import startup
from megatron_tied.training.config_file import load_config
from megatron_tied.training.validation import to_json
from tests.training.runs import Corpus, Finished, alone_command, deepspeed_command, finish, write_config

EP = "parallel.expert_model_parallel_size"


@pytest.fixture
def config(corpus: Corpus, tmp_path: Path) -> Path:
    return write_config(tmp_path, corpus)


def told(finished: Finished) -> list[str]:
    """The problems told, if they are all that was printed and the exit code is that of bad input."""
    assert finished.code == 2, finished.output
    head, *lines = finished.our_lines
    assert re.fullmatch(rf"error: {len(lines)} problems? in the input", head), finished.output
    assert all(line.startswith("  ") for line in lines), finished.output
    return [line.strip() for line in lines]


# Known from the config alone: no process waits for another, and torch is not loaded.


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["train.stps=3"], "train.stps = 3: is not a key of the config; did you mean 'train.steps'?"),
        ([f"{EP}=3"], f"{EP} = 3: must divide model.num_moe_experts = 4; valid: 1"),
        (["tie.group_size=5"], "tie.group_size = 5: must be at most 4: 4 MoE layers lie between prelude and coda"),
        (["model.moe_router_topk=5"], "model.moe_router_topk = 5: must be at most model.num_moe_experts = 4"),
        (["deepspeed.train_batch_size=4"], "deepspeed.train_batch_size = 4: contradicts train.global_batch_size = 8"),
        (["deepspeed.gradient_clipping=2", "optimizer.clip_grad=1"], "deepspeed.gradient_clipping = 2: contradicts"),
        (["deepspeed.steps_per_print=often"], "deepspeed.steps_per_print = 'often': must be an integer"),
        (["deepspeed.tensorboard=on"], "deepspeed.tensorboard = True: must be a mapping of keys"),
        (["--stps", "3"], "unrecognized arguments: --stps"),
    ],
)
def test_one_problem_of_the_config(config: Path, overrides: list[str], line: str, capsys: pytest.CaptureFixture[str]):
    code = pretrain.main(["--config", str(config), f"{EP}=1", *overrides])
    output = capsys.readouterr()
    assert output.out == ""
    assert line in told(Finished(code, output.err))[0]


def test_what_contradicts_itself_is_told_with_the_valid_value(config: Path, capsys: pytest.CaptureFixture[str]):
    said = ["deepspeed.train_batch_size=4", "deepspeed.gradient_clipping=2", "optimizer.clip_grad=1"]
    code = pretrain.main(["--config", str(config), f"{EP}=1", "train.global_batch_size=8", *said])
    assert told(Finished(code, capsys.readouterr().err)) == [
        'deepspeed.train_batch_size = 4: contradicts train.global_batch_size = 8: leave it out, or write "auto" or 8',
        'deepspeed.gradient_clipping = 2: contradicts optimizer.clip_grad = 1.0: leave it out, or write "auto" or 1.0',
    ]


def test_overrides_may_stand_on_both_sides_of_the_config(config: Path, capsys: pytest.CaptureFixture[str]):
    code = pretrain.main(["train.steps=0", "--config", str(config), "train.seed=-1"])
    assert told(Finished(code, capsys.readouterr().err)) == [
        "train.steps = 0: must be >= 1",
        "train.seed = -1: must be >= 0",
    ]


def test_launcher_ends_with_2_and_tells_all_problems_once(config: Path):
    finished = finish(deepspeed_command(config, f"{EP}=4", "tie.group_size=5", "train.global_batch_size=6"))
    assert [line.partition(":")[0] for line in told(finished)] == [
        "tie.group_size = 5",
        f"{EP} = 4",
        "train.global_batch_size = 6",
    ]


def test_told_also_when_the_first_rank_is_late(config: Path):
    command = deepspeed_command(config, "train.stps=3", module="tests.training.slow_first_rank")
    assert told(finish(command)) == ["train.stps = 3: is not a key of the config; did you mean 'train.steps'?"]


# Known from files, and from DeepSpeed and Megatron-Core: before a model is built.


def test_files_and_deepspeed_values_are_told_together_by_one_rank(config: Path, tmp_path: Path):
    kernels = tmp_path / "kernels"
    missing = tmp_path / "nothing"
    overrides = [
        f"data.train={missing}",
        "deepspeed.zero_optimization.reduce_bucket_size=big",
        "deepspeed.zero_optimization.offload_optimizer.device=tape",
    ]
    finished = finish(deepspeed_command(config, *overrides), TORCH_EXTENSIONS_DIR=str(kernels))
    zero = "deepspeed.zero_optimization"
    assert told(finished) == [
        f"data.train = '{missing}': needs the file {missing}.bin",
        f"data.train = '{missing}': needs the file {missing}.idx",
        f"{zero}.reduce_bucket_size = 'big': must be a valid integer, unable to parse string as an integer",
        f"{zero}.offload_optimizer.device = 'tape': must be 'none', 'cpu' or 'nvme'",
    ]
    assert not kernels.exists()


def test_vocabulary_and_length_against_the_data(config: Path, corpus: Corpus):
    overrides = [f"{EP}=1", "model.vocab_size=300", "data.tokenizer=null", "train.seq_length=1000000"]
    too_long, held_out_too_long, too_small = told(finish(alone_command(config, *overrides)))
    prefix = re.escape(str(corpus.a))
    length = rf"train.seq_length = 1000000: must be <= (\d+): data.{{}} has only (\d+) tokens of {prefix}"
    for line, use in ((too_long, "train"), (held_out_too_long, "validation")):
        found = re.fullmatch(length.format(use), line)
        assert found, line
        assert int(found[2]) == int(found[1]) + 1
    assert re.fullmatch(r"model.vocab_size = 300: must be >= 320: \S+ holds token id 319", too_small), too_small
    assert not (config.parent / "run").exists()


@pytest.mark.parametrize(("precision", "problems"), [("fp16", 1), ("bf16", 0), ("fp32", 0)])
def test_a_precision_that_the_host_lacks(
    config: Path, precision: str, problems: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: None)
    found = startup._local_problems(load_config(config, [f"{EP}=1", f"train.precision={precision}"]))
    told = "train.precision = 'fp16': DeepSpeed does not train in fp16 on this host's cpu; use bf16 or fp32"
    assert list(map(str, found)) == [told] * problems


def test_run_directory_that_cannot_be_made(config: Path):
    # Also for root, who may write to every directory: a file is in the way.
    directory = config / "run"
    (line,) = told(finish(alone_command(config, f"{EP}=1", f"train.run_dir={directory}")))
    assert line.startswith(f"train.run_dir = '{directory}': must be a directory that can be written: ")
    assert "Not a directory" in line


@pytest.mark.usefixtures("one_process")
def test_what_one_host_refuses_stops_all_ranks(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = to_json(("model.moe_permute_fusion", True, "needs Transformer Engine"))
    told_by_ranks = iter([["node0", "node1"], [[], [refused]]])
    monkeypatch.setattr(startup, "gather_json", lambda value: next(told_by_ranks))
    with pytest.raises(ConfigError, match=r"moe_permute_fusion = True: needs Transformer Engine \(on node1\)$"):
        startup.check_model(load_config(config, [f"{EP}=1"]))


def test_what_megatron_core_refuses(config: Path):
    (line,) = told(finish(alone_command(config, f"{EP}=1", "model.recompute_granularity=full")))
    assert line.startswith("model = {'recompute_granularity': 'full'}: is refused by Megatron-Core: ")
    assert 'recompute_method must be "block" or "uniform"' in line
