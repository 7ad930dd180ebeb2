"""What is computed from measured figures: kinds of kernels, whose bytes were reduced, bytes of tensors, messages."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from megatron_tied.bench.job import HUGGINGFACE, MEGATRON_CORE, TIED, UNTIED, Job, load_subject
from megatron_tied.bench.kernels import Interval, kind_of, own_times, shares
from megatron_tied.bench.measurement import _share_of_copies, model_flops
from megatron_tied.bench.memory import PeakOfProcess, storage_bytes, used_bytes
from megatron_tied.bench.messages import read_line, told_line
from megatron_tied.bench.progress import Done
from megatron_tied.bench.report import different_models
from megatron_tied.bench.roofline import Ceilings
from megatron_tied.bench.traffic import attribute
from megatron_tied.bench.turns import take_turns
from megatron_tied.errors import Problem


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mm", "GEMM"),
        ("aten::_grouped_mm", "GEMM"),
        ("aten::hardtanh_backward", "element-wise"),
        ("autograd::engine::evaluate_function: AddmmBackward0", "other"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopB_TNT", "GEMM"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "GEMM"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("void flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>", "attention"),
        ("aten::mul", "element-wise"),
        ("aten::mul_", "element-wise"),
        ("aten::addcdiv_", "element-wise"),
        ("aten::_softmax_backward_data", "element-wise"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "element-wise"),
        ("aten::copy_", "copies and permutes"),
        ("aten::index_put_", "copies and permutes"),
        ("Memcpy DtoD (Device -> Device)", "copies and permutes"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "collectives"),
        ("gloo:all_to_all", "collectives"),
        ("_AllToAll", "collectives"),
        ("PreBackwardFunctionForModuleBackward", "other"),
    ],
)
def test_kernels_are_told_apart_by_their_names(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_shares_are_of_the_whole_and_the_largest_come_first() -> None:
    found = shares(Counter({"aten::mm": 60.0, "aten::bmm": 15.0, "aten::add": 20.0, "whatever": 5.0}))
    assert found["shares"]["GEMM"] == pytest.approx(0.75)
    assert sum(found["shares"].values()) == pytest.approx(1.0)
    assert [item["name"] for item in found["largest"]] == ["aten::mm", "aten::add", "aten::bmm", "whatever"]


def test_an_operators_own_time_is_without_what_it_calls() -> None:
    calls = [Interval(0, 100, "step"), Interval(10, 40, "linear"), Interval(15, 35, "mm"), Interval(40, 60, "linear")]
    assert own_times([*calls, Interval(100, 120, "mm")]) == {"step": 50, "linear": 30, "mm": 40}
    # It begins with what calls it.
    assert own_times([Interval(0, 10, "mm"), Interval(0, 30, "linear")]) == {"linear": 20, "mm": 10}


SIZES = Counter({"rest": 100, "tied": 40, "untied": 20})


def test_groups_of_their_own_size_tell_experts_from_the_rest() -> None:
    found = attribute(Counter({4: 400, 2: 240}), SIZES, width=4, times=1, ranks=4, expert_ranks=2)
    assert (found.rest, found.experts, found.tied_layers) == (400, 240, 160)


@pytest.mark.parametrize("expert_ranks", [2, None])
def test_of_one_group_for_all_what_is_left_is_the_tied_layers(expert_ranks: int | None) -> None:
    found = attribute(Counter({2: 2 * 640}), SIZES, width=4, times=2, ranks=2, expert_ranks=expert_ranks)
    assert (found.rest, found.experts, found.tied_layers) == (800, 480, 320)


def test_a_bank_that_is_reduced_for_each_of_its_layers_shows() -> None:
    found = attribute(Counter({2: 640 + 3 * 160}), SIZES, width=4, times=1, ranks=2, expert_ranks=2)
    assert (found.rest, found.tied_layers) == (400, 4 * 160)


def test_experts_that_no_rank_shares_are_not_reduced() -> None:
    found = attribute(Counter({2: 400}), SIZES, width=4, times=1, ranks=2, expert_ranks=1)
    assert (found.rest, found.experts, found.tied_layers) == (400, 0, 0)


def test_one_rank_reduces_nothing() -> None:
    found = attribute(Counter(), SIZES, width=0, times=1, ranks=1, expert_ranks=1)
    assert (found.rest, found.experts, found.tied_layers) == (0, 0, 0)


def test_a_bucket_counts_as_what_is_in_it_and_a_whole_with_its_parts_once() -> None:
    bucket, whole = torch.zeros(1000), torch.zeros(10)
    assert used_bytes([bucket[:10], bucket[10:30]]) == 4 * 30
    assert used_bytes([whole, whole[:4], whole[4:]]) == 4 * 10
    assert used_bytes([whole, whole]) == 4 * 10
    assert storage_bytes([bucket[:10], whole, whole[2:]]) == 4 * 1010


def test_the_peak_of_a_process_stays_after_memory_is_given_back() -> None:
    size = 1 << 27
    _touch(4 * size)  # before: not its business
    peak = PeakOfProcess()
    _touch(size)
    assert 0.9 * size < peak.bytes() < 1.5 * size


def _touch(size: int) -> None:
    torch.ones(size, dtype=torch.uint8)


def test_of_two_measurements_the_higher_ceilings_stand() -> None:
    assert Ceilings(2.0, 5.0).or_better(Ceilings(3.0, 4.0)) == Ceilings(3.0, 5.0)


def test_a_peer_that_computes_another_model_is_told() -> None:
    losses = {TIED: 5.25, UNTIED: 5.5, HUGGINGFACE: 5.27, MEGATRON_CORE: 5.501}
    rows = {name: {"first_loss": loss} for name, loss in losses.items()}
    assert list(different_models(rows)) == [
        "WARNING: the first loss of huggingface is 5.2700 for 5.2500: it computes another model"
    ]


def test_every_contender_begins_a_round_as_often_as_the_others() -> None:
    ran: list[str] = []

    def contender(name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, run=lambda batches, steps: ran.append(name) or 2.0 * steps)

    rounds = list(take_turns([contender(name) for name in "abc"], lambda step: [], rounds=4, steps=5))
    assert "".join(ran) == "abcbcacababc"
    assert rounds == [dict.fromkeys("abc", 2.0)] * 4


def test_flops_are_those_of_each_contenders_model() -> None:
    """A wider tied bank has wider routers; the peers of the untied model have not."""
    subject = load_subject(None, ["tie.num_tied_experts=32", "model.vocab_size=512"], 1, precision="fp32")
    job = Job(subject, 1)
    plain = Job(load_subject(None, ["model.vocab_size=512"], 1, precision="fp32"), 1)
    assert model_flops(job, TIED) == model_flops(job, HUGGINGFACE) > model_flops(job, UNTIED)
    assert model_flops(job, UNTIED) == model_flops(job, MEGATRON_CORE) == model_flops(plain, TIED)


def test_muon_is_not_compared_with_copies() -> None:
    subject = load_subject(None, ["optimizer.preset=tying_the_loop", "model.vocab_size=512"], 1, precision="fp32")
    contender = SimpleNamespace(engine=SimpleNamespace(optimizer=None))  # whose states are not AdamW's
    assert _share_of_copies(Job(subject, 1), contender, 1.0, Ceilings(1.0, 1.0)) is None


def test_messages_are_found_among_other_lines() -> None:
    done, problem = Done("taking turns", 3, 10), Problem("model.recompute_granularity", "full", "must be left out")
    for said, found in ((done, done), ([problem], [problem])):
        line = told_line(said)
        assert read_line(line) == found
        assert read_line(f"[rank 0] {line}") == found
        assert read_line(line[:-4]) is None
    assert read_line("INFO: loaded") is None
