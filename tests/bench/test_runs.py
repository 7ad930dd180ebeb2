"""Real runs of the command: what it measures, writes and shows, on one rank with peers and on two."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_tied.bench.job import HUGGINGFACE, MEGATRON_CORE, TIED, UNTIED, Job, load_subject
from megatron_tied.bench.launch import RanksFailedError, peak_on_ranks, run_on_ranks
from megatron_tied.errors import ConfigError
from tests.distributed.launch import ROOT, launch
from tests.processes import run_to_end

LAYERS, HIDDEN, EXPERTS, WIDTH, GROUP = 6, 32, 8, 16, 4
MODEL = {
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "num_moe_experts": EXPERTS,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": WIDTH,
    "vocab_size": 64,
    "qk_layernorm": True,
    "layernorm_epsilon": 1e-6,
    "moe_aux_loss_coeff": 0.01,
    # As large as in a trained model: what is left out of a computation shows.
    "init_method_std": 0.2,
}
BANK = EXPERTS * 3 * HIDDEN * WIDTH  # numbers in the experts of a layer
FP32 = 4
SEQ_LENGTH, SEQUENCES = 16, 2


def batches(sequences: int) -> dict[str, Any]:
    """A train section with so many sequences a step, each a micro-batch."""
    sizes = {"seq_length": SEQ_LENGTH, "micro_batch_size": 1, "global_batch_size": sequences}
    return {"train": {"run_dir": "none", "precision": "fp32", **sizes}}


def config_file(directory: Path, **sections: Any) -> Path:
    """A config of the tiny model; nothing that it names need be there."""
    config = {
        "model": MODEL,
        "tie": {"group_size": GROUP, "skip_first": 1, "skip_last": 1},
        "data": {"train": "none"},
        **batches(SEQUENCES),
        **sections,
    }
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def bench(config: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """The command in a process of its own, in the config's directory: what is in its JSON file, and what it prints."""
    file = config.parent / "found.json"
    command = [sys.executable, "-m", "megatron_tied.cli.main", "bench", "--config", str(config), "--json", str(file)]
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = {**clean, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = run_to_end([*command, *arguments], cwd=config.parent, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout
    (run,) = json.loads(file.read_text())["runs"]
    return run, done.stdout


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Against every peer that needs no second rank, in steps of several micro-batches."""
    config = config_file(tmp_path_factory.mktemp("one"))
    peers = f"{UNTIED},{HUGGINGFACE},{MEGATRON_CORE}"
    return bench(config, "--against", peers, "--rounds", "3", "--steps", "1", "--no-memory")


def test_the_peers_compute_the_same_models(one_rank: tuple[dict[str, Any], str]) -> None:
    found = one_rank[0]["contenders"]
    assert found.keys() == {TIED, UNTIED, HUGGINGFACE, MEGATRON_CORE}
    assert found[HUGGINGFACE]["parameters"] == found[TIED]["parameters"]
    assert found[MEGATRON_CORE]["parameters"] == found[UNTIED]["parameters"]
    assert found[UNTIED]["parameters"] - found[TIED]["parameters"] == (GROUP - 1) * BANK
    # The same weights and tokens give the same loss; tied and untied differ, so the comparison can tell.
    assert found[HUGGINGFACE]["first_loss"] == pytest.approx(found[TIED]["first_loss"], abs=1e-4)
    assert found[MEGATRON_CORE]["first_loss"] == pytest.approx(found[UNTIED]["first_loss"], abs=1e-4)
    assert abs(found[UNTIED]["first_loss"] - found[TIED]["first_loss"]) > 1e-3


def test_every_figure_of_a_contender_is_there(one_rank: tuple[dict[str, Any], str]) -> None:
    run = one_rank[0]
    for name, row in run["contenders"].items():
        assert len(row["seconds"]) == 3
        assert min(row["seconds"]) <= row["seconds_of_a_step"] <= max(row["seconds"])
        assert row["tokens_per_second"] == pytest.approx(SEQUENCES * SEQ_LENGTH / row["seconds_of_a_step"])
        phases = row["phases"]
        assert phases.keys() == {"data", "forward", "backward", "reduce", "optimizer", "other"}
        assert min(phases["forward"], phases["backward"], phases["optimizer"]) > 0
        # They are means, of the same steps.
        assert sum(phases.values()) == pytest.approx(sum(row["seconds"]) / 3, rel=0.05)
        states = row["states"]
        assert states["weights"] >= FP32 * row["parameters"]
        assert states["gradients"] >= FP32 * row["parameters"]
        assert states["optimizer"] >= 2 * FP32 * row["parameters"]
        assert states["total"] == states["weights"] + states["gradients"] + states["optimizer"]
        assert row["reduction_bytes"] == {"experts": 0, "tied_layers": 0, "rest": 0}, "one rank has nobody to tell"
        assert row["bank_gathers"] is None
        assert sum(row["kernels"]["shares"].values()) == pytest.approx(1)
        assert row["kernels"]["shares"]["GEMM"] > 0
        assert len(row["kernels"]["largest"]) == 10
        assert 0 < row["share_of_gemm_ceiling"] < 1
        assert 0 < row["share_of_copy_bandwidth_in_optimizer"] < 1
        assert row["peak_memory"] is None, name
    # Weights, gradients and two states: all that plain PyTorch keeps.
    plain = run["contenders"][HUGGINGFACE]
    assert plain["states"]["total"] == pytest.approx(4 * FP32 * plain["parameters"], rel=0.01)


def test_the_conditions_and_the_pairs_are_there(one_rank: tuple[dict[str, Any], str]) -> None:
    run, shown = one_rank
    for name, comparison in run["comparisons"].items():
        theirs, ours = (run["contenders"][which]["seconds"] for which in (name, TIED))
        assert comparison["pairs"] == pytest.approx([slow / fast for slow, fast in zip(theirs, ours, strict=True)])
        assert f"speed of tied over {name}, 3 rounds of 1 steps: {comparison['told']}" in shown
    assert run["threads"] == 1
    assert run["software"].keys() >= {"torch", "megatron-core", "deepspeed", "transformers"}
    assert min(run["ceilings"].values()) > 0
    assert "gradient reduction of experts: none" in shown
    assert "6 layers: 0 [1 2 3 4] 5" in shown
    assert yaml.safe_load(json.dumps(run["config"]))["model"]["hidden_size"] == HIDDEN


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Experts on both ranks, ZeRO 3, two micro-batches a step; nothing is fetched ahead, so that a gather is a need.

    Under a launcher, whose ranks the command takes.
    """
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
    config = config_file(tmp_path_factory.mktemp("two"), deepspeed={"zero_optimization": zero}, **batches(4))
    file = config.with_suffix(".json")
    arguments = ["--config", str(config), "--json", str(file), "--against", f"{UNTIED},{HUGGINGFACE}"]
    shown = launch("megatron_tied.cli.main", 2, "bench", *arguments, "--rounds", "1", "--steps", "1")
    (run,) = json.loads(file.read_text())["runs"]
    return run, shown


def test_tied_layers_reduce_one_gth_of_the_bytes(two_ranks: tuple[dict[str, Any], str]) -> None:
    run, shown = two_ranks
    ours, theirs, plain = (run["contenders"][name]["reduction_bytes"] for name in (TIED, UNTIED, HUGGINGFACE))
    # After each of the two micro-batches.
    assert ours["tied_layers"] == 2 * FP32 * BANK
    assert theirs["tied_layers"] == GROUP * ours["tied_layers"]
    assert ours["experts"] - ours["tied_layers"] == theirs["experts"] - theirs["tied_layers"] == 2 * 2 * FP32 * BANK
    assert ours["rest"] == theirs["rest"] > 0
    # Plain PyTorch reduces once a step.
    assert {name: 2 * count for name, count in plain.items()} == ours
    assert "(4 times as many)" in shown


def test_a_bank_is_gathered_twice_a_micro_batch(two_ranks: tuple[dict[str, Any], str]) -> None:
    run, shown = two_ranks
    assert run["contenders"][TIED]["bank_gathers"] == 2
    assert run["contenders"][UNTIED]["bank_gathers"] >= GROUP
    assert run["contenders"][HUGGINGFACE]["bank_gathers"] is None
    assert "ZeRO 3 gathers per micro-batch of a tie group's experts: tied 2" in shown


def test_one_round_shows_no_difference(two_ranks: tuple[dict[str, Any], str]) -> None:
    run, shown = two_ranks
    assert run["comparisons"][UNTIED]["ratio"] is None
    assert "speed of tied over untied, 1 rounds of 1 steps: no difference that this run can show" in shown


@pytest.fixture(scope="module")
def expert_parallel(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Experts spread over two ranks, against all peers."""
    config = config_file(tmp_path_factory.mktemp("spread"), parallel={"expert_model_parallel_size": 2})
    peers = "untied,huggingface,megatron-core,autoep"
    return bench(config, "--ranks", "2", "--against", peers, "--rounds", "1", "--steps", "1", "--no-memory")


def test_experts_of_one_rank_alone_are_not_reduced(expert_parallel: tuple[dict[str, Any], str]) -> None:
    run, _ = expert_parallel
    assert run["left_out"] == {}
    found = run["contenders"]
    rests = {row["reduction_bytes"]["rest"] for row in found.values()}
    assert len(rests) == 1
    for name, row in found.items():
        if name != HUGGINGFACE:
            assert (row["reduction_bytes"]["experts"], row["reduction_bytes"]["tied_layers"]) == (0, 0), name
    # The paper's approach has every expert on every rank, and reduces it.
    assert found[HUGGINGFACE]["reduction_bytes"]["tied_layers"] == FP32 * BANK
    assert found[HUGGINGFACE]["parameters"] > found[TIED]["parameters"]


def test_peers_get_the_experts_of_all_ranks(expert_parallel: tuple[dict[str, Any], str]) -> None:
    found = {name: row["first_loss"] for name, row in expert_parallel[0]["contenders"].items()}
    assert found[HUGGINGFACE] == pytest.approx(found[TIED], abs=1e-4)
    for name in ("megatron-core", "autoep"):
        assert found[name] == pytest.approx(found[UNTIED], abs=1e-4)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """The tiny model on one CPU rank."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return Job(load_subject(config_file(tmp_path), (), 1, precision="fp32"), 1, rounds=1, steps=1)


def test_a_contender_alone_tells_its_peak(job: Job) -> None:
    peak = peak_on_ranks(job, TIED)
    # States of this model are 2 MB: it is mostly what code and allocator take when they are first used.
    assert 2e6 < peak < 1e9


def test_ranks_that_die_leave_their_last_words(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "toaster")
    with pytest.raises(RanksFailedError, match="ended without a result, with exit code 1") as raised:
        run_on_ranks(job, lambda *_: None)
    assert any("toaster" in line for line in raised.value.lines)


def test_what_only_the_ranks_find_is_bad_input_all_the_same(job: Job, tmp_path: Path) -> None:
    config = load_subject(config_file(tmp_path), ["model.recompute_granularity=full"], 1, precision="fp32")
    with pytest.raises(ConfigError, match="is refused by Megatron-Core"):
        run_on_ranks(Job(config, 1), lambda *_: None)
