"""What is warned about, and pipelines that part tie groups."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_tied.megatron_lm import validation
from megatron_tied.patching.conflicts import conflicts
from megatron_tied.patching.pipeline import pipeline_cut
from megatron_tied.topology import TieConfig, TieTopology
from tests.patching.test_savings import read

TOPOLOGY = TieTopology.build(TieConfig(group_size=4), 12)  # 0 1 [2-5] [6-9] 10 11


def warned(text: str, topology: TieTopology | None = TOPOLOGY, tie: TieConfig = TOPOLOGY.tie) -> list[str]:
    return [str(problem) for problem in conflicts(read(f"--num-layers 12 {text}"), tie, topology)]


@pytest.mark.parametrize("name", validation.REFUSED)
def test_what_a_run_refuses_is_warned_about(name: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    (told,) = warned(f"{flag} X")
    assert told.startswith(f"{flag} = 'X': cannot be used with tied experts: it ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--cuda-graph-impl local", "must be none"),
        ("--external-cuda-graph", "captures a layer"),
        ("--deepspeed --zero-stage 2 --recompute-granularity full", "loses gradients of tied experts"),
        ("--deepspeed-config x --recompute-granularity selective --recompute-modules moe", "loses gradients"),
        ("--moe-expert-capacity-factor 1.1", "stays a limit of each layer"),
        ("--first-k-dense-replace 1", "say --moe-layer-freq '([0]*1+[1]*11)' instead"),
        ("--first-k-dense-replace 2", "say --moe-layer-freq '([0]*2+[1]*10)' instead"),
        (
            "--fp8-format hybrid --first-last-layers-bf16 --num-layers-at-start-in-bf16 3",
            "keeps 3 first and 1 last layers in bf16, which cuts through the tie groups of layers [2, 3, 4, 5]",
        ),
    ],
)
def test_warnings(text: str, message: str) -> None:
    (told,) = warned(text)
    assert message in told


@pytest.mark.parametrize(
    "text",
    [
        "",
        "--cuda-graph-impl none",
        "--recompute-granularity full",
        "--deepspeed --zero-stage 0 --recompute-granularity full",
        "--deepspeed --zero-stage 2 --recompute-granularity selective --recompute-modules core_attn",
        "--fp8-format hybrid --first-last-layers-bf16",
        "--first-last-layers-bf16 --num-layers-at-start-in-bf16 3",
        "--first-k-dense-replace -1",
        "--pipeline-model-parallel-size 1",
        "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 6",
        "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et*10|ttL",
    ],
)
def test_no_warnings(text: str) -> None:
    assert warned(text) == []


@pytest.mark.parametrize(
    ("experts", "text", "message"),
    [
        (6, "--expert-model-parallel-size 4", "must be a multiple of --expert-model-parallel-size = 4"),
        (6, "--moe-router-num-groups 4", "must be a multiple of --moe-router-num-groups = 4"),
        (6, "--moe-router-topk 8", "must be at least --moe-router-topk = 8"),
        (1, "", "must be at least --moe-router-topk = 2"),
        (6, "--moe-router-enable-expert-bias", "cannot be given with --moe-router-enable-expert-bias"),
    ],
)
def test_the_experts_of_a_bank_must_go_with_the_routers(experts: int, text: str, message: str) -> None:
    (told,) = warned(text, tie=TieConfig(group_size=4, num_tied_experts=experts))
    assert told.startswith(f"--moe-tie-num-experts = {experts}: {message}")


def test_experts_that_go_with_the_routers_and_what_is_not_known() -> None:
    tie = TieConfig(group_size=4, num_tied_experts=6)
    assert warned("--expert-model-parallel-size 2 --moe-router-topk 6", tie=tie) == []
    assert warned("--expert-model-parallel-size $EP --moe-router-topk $TOPK", tie=tie) == []


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (
            "--pipeline-model-parallel-size 4",
            ["--pipeline-model-parallel-size = '4': (layers 0-2 | 3-5 | 6-8 | 9-11)", "[2, 3, 4, 5], [6, 7, 8, 9]"],
        ),
        (
            "--pipeline-model-parallel-size 4",
            ["the run is cut between them, layers 0-1 | 2-5 | 6-9 | 10-11, at most 4"],
        ),
        (
            "--pipeline-model-parallel-size 2 --decoder-last-pipeline-num-layers 4",
            ["--decoder-last-pipeline-num-layers = '4'", "which the run refuses", "'Et*6|t*6L' works"],
        ),
        (
            "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et*8|t*4L",
            ["(layers 0-7 | 8-11) parts the tie groups of layers [6, 7, 8, 9], which the run refuses"],
        ),
        ("--pipeline-model-parallel-size 12", ["12 parts of one layer", "no cut into 12 leaves them whole"]),
        (
            "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3",
            ["(layers 0-2 | 3-5 | 6-8 | 9-11)"],
        ),
    ],
)
def test_a_pipeline_that_parts_tie_groups(text: str, messages: list[str]) -> None:
    (told,) = warned(text)
    assert all(message in told for message in messages)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("", "1 first and 1 last layers in bf16, which cuts through the tie groups of layers [0, 1, 2], [9, 10, 11]:"),
        ("--num-layers-at-start-in-bf16 0", "0 first and 1 last layers in bf16, which cuts through the tie groups of"),
        ("--num-layers-at-end-in-bf16 4", "[0, 1, 2], [6, 7, 8]:"),
        ("--num-layers-at-start-in-bf16 3 --num-layers-at-end-in-bf16 2", "layers [9, 10, 11]:"),
    ],
)
def test_groups_of_two_precisions(more: str, message: str) -> None:
    topology = TieTopology.build(TieConfig(group_size=3, skip_first=0, skip_last=0), 12)
    (told,) = warned(f"--fp8 hybrid --first-last-layers-bf16 {more}", topology)
    assert message in told
    whole = "--num-layers-at-start-in-bf16 3 --num-layers-at-end-in-bf16 6"
    assert warned(f"--fp8 hybrid --first-last-layers-bf16 {whole}", topology) == []


def test_copies_in_every_stage_are_no_refusal() -> None:
    topology = TieTopology.build(TieConfig(group_size=4, pipeline="allreduce"), 12)
    (told,) = warned("--pipeline-model-parallel-size 4", topology)
    assert "each stage keeps a copy of their experts" in told


def test_without_layers_only_what_needs_none_is_warned_about() -> None:
    assert warned("--pipeline-model-parallel-size 4 --use-torch-fsdp2", None) != []
    assert warned("--pipeline-model-parallel-size 4", None) == []


LAYOUT = "Et*3|(tt|)*3,(tt|)*3mL"
LAYOUTS = {
    "pipeline_model_parallel_layout": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "virtual_pipeline_model_parallel_size": None,
}


@pytest.mark.parametrize(
    ("layers", "stages", "given", "text"),
    [
        (12, 4, {}, ""),
        (12, 2, {"virtual_pipeline_model_parallel_size": 3}, "--num-layers-per-virtual-pipeline-stage 2"),
        (12, 2, {"virtual_pipeline_model_parallel_size": 3}, "--num-virtual-stages-per-pipeline-rank 3"),
        (11, 3, {"decoder_first_pipeline_num_layers": 3}, "--decoder-first-pipeline-num-layers 3"),
        (11, 3, {"decoder_last_pipeline_num_layers": 5}, "--decoder-last-pipeline-num-layers 5"),
        (
            12,
            3,
            {"decoder_first_pipeline_num_layers": 3, "decoder_last_pipeline_num_layers": 4},
            "--decoder-first-pipeline-num-layers 3 --decoder-last-pipeline-num-layers 4",
        ),
        (11, 4, {"account_for_embedding_in_pipeline_split": True}, "--account-for-embedding-in-pipeline-split"),
        (11, 4, {"account_for_loss_in_pipeline_split": True}, "--account-for-loss-in-pipeline-split"),
        (15, 4, {"pipeline_model_parallel_layout": LAYOUT}, f"--pipeline-model-parallel-layout {LAYOUT}"),
    ],
)
def test_a_cut_is_that_of_megatron_core(layers: int, stages: int, given: dict[str, object], text: str) -> None:
    from megatron_tied.megatron_lm.pipeline_cut import layers_of_chunks

    args = SimpleNamespace(num_layers=layers, **{**LAYOUTS, **given})
    found = pipeline_cut(read(f"--pipeline-model-parallel-size {stages} {text}"), layers)
    assert found is not None
    assert found == layers_of_chunks(args, stages)


@pytest.mark.parametrize("text", ["--decoder-first-pipeline-num-layers 5", "--num-layers-per-virtual-pipeline-stage 5"])
def test_a_cut_that_does_not_divide_is_not_guessed(text: str) -> None:
    assert pipeline_cut(read(f"--pipeline-model-parallel-size 4 {text}"), 12) is None


def test_a_layout_of_other_layers_is_not_guessed() -> None:
    assert pipeline_cut(read(f"--pipeline-model-parallel-size 4 --pipeline-model-parallel-layout {LAYOUT}"), 14) is None
