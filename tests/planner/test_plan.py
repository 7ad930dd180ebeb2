"""Plans by hand: model states, the paper's table, flows between nodes, searches, advice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_tied.errors import ConfigError
from megatron_tied.models.config import ModelConfig
from megatron_tied.planner.activations import FUSED, busiest, loss_activations
from megatron_tied.planner.advice import changes
from megatron_tied.planner.compute import flops_per_token, recomputed_share
from megatron_tied.planner.hardware import GB, load_hardware
from megatron_tied.planner.layout import Layout, Recompute
from megatron_tied.planner.plan import Plan, Subject
from megatron_tied.planner.search import candidates, search
from megatron_tied.planner.traffic import Flow
from megatron_tied.topology import TieConfig

TIED = TieConfig(group_size=4)


WIDER = TieConfig(group_size=4, num_tied_experts=256)


def subject(preset: str = "olmoe", hardware: str = "h100", **fields: object) -> Subject:
    return Subject(ModelConfig.resolve({"preset": preset, **fields}), load_hardware(hardware))


def olmoe(tie: TieConfig = TIED, **layout: object) -> Plan:
    fields = {"world_size": 8, "seq_length": 2048, "global_batch_size": 256, **layout}
    return subject().plan(tie, Layout(**fields))


@pytest.mark.parametrize(
    ("preset", "tie", "gigabytes"),
    [
        ("olmoe", TieConfig(), 113.98),
        ("olmoe", TIED, 56.00),
        ("olmoe", TieConfig(group_size=2), 16 * 4.707932160),
        ("olmoe", TieConfig(group_size=4, num_tied_experts=128), 16 * 4.709505024),
        ("olmoe", TieConfig(group_size=4, num_tied_experts=256), 16 * 7.128569856),
        ("qwen3_moe", TieConfig(), 16 * 6.410289152),
        ("qwen3_moe", TIED, 16 * 2.588229632),
    ],
)
def test_model_states_of_the_paper(preset: str, tie: TieConfig, gigabytes: float) -> None:
    """16 bytes a parameter on one rank: bf16 weights and gradients, fp32 master, two moments."""
    plan = subject(preset).plan(tie, Layout(world_size=1, seq_length=2048))
    assert plan.memory.states.device / GB == pytest.approx(gigabytes, rel=1e-4)


def test_zero_and_expert_parallelism_divide_states() -> None:
    count = olmoe().parameters
    experts, dense = count.routed_experts, count.total - count.routed_experts
    for stage, expert_parallel in ((1, 1), (1, 8), (2, 2), (3, 4)):
        states = olmoe(zero_stage=stage, expert_parallel=expert_parallel).memory.states
        local = dense + experts / expert_parallel
        part = count.total / 8
        assert states.weights == pytest.approx(2 * (part if stage == 3 else local), rel=1e-3)
        assert states.optimizer == pytest.approx(12 * part, rel=1e-3)
        if stage != 2:  # there a rank keeps whole tensors: see the next test
            assert states.gradients == pytest.approx(2 * (part if stage == 3 else local), rel=1e-3)


def test_stage_2_keeps_whole_gradients_of_tensors_on_its_boundaries() -> None:
    """One bank, so one tensor of two thirds and one of a third, cut over four ranks: some rank has a part of both."""
    model = ModelConfig.resolve(
        {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 1, "num_moe_experts": 8, "moe_ffn_hidden_size": 64}
        | {"vocab_size": 8}
    )
    layout = Layout(world_size=4, seq_length=8, global_batch_size=4, zero_stage=2)
    plan = Subject(model, load_hardware("cpu")).plan(TieConfig(), layout)
    bank = 8 * 3 * 64 * 64
    assert bank <= plan.memory.states.gradients / 2 < bank * 1.3


def test_muon_keeps_one_moment_for_matrices() -> None:
    adam, muon = (olmoe(world_size=1, optimizer=name).memory.states for name in ("adamw", "muon"))
    kinds = adam.parameters
    vectors_and_ends = sum(kinds[kind] for kind in ("embedding", "output", "norms", "router"))
    assert adam.optimizer - muon.optimizer == 4 * (sum(kinds.values()) - vectors_and_ends)


def test_offload_moves_states_to_the_host() -> None:
    here, offloaded = olmoe(zero_stage=2), olmoe(zero_stage=2, offload_optimizer=True)
    assert offloaded.memory.states.optimizer == offloaded.memory.states.gradients == 0
    # 12 bytes of states and 4 of gradient in place of 12 on the device; whole gradients of the micro-batches so far, of
    # which the device had two copies; and a buffer of the largest tensor on either side.
    largest = 64 * 2 * 1024 * 2048 * 2
    expected = here.memory.states.optimizer * 16 / 12 + here.memory.states.gradients / 2 + largest
    assert offloaded.memory.states.host == pytest.approx(expected)
    assert offloaded.memory.buffers - here.memory.buffers == largest
    # At stage 3 gathers read what a rank has of the parameters from the host, too.
    slow, slower = (olmoe(zero_stage=3, offload_optimizer=True, offload_parameters=there) for there in (False, True))
    assert slower.time.seconds["optimizer"] > slow.time.seconds["optimizer"]
    assert offloaded.time.total > here.time.total


def test_a_fused_weight_gradient_keeps_the_inputs_of_a_group() -> None:
    """They wait for the owner's backward, when the activations of later layers, and those of the loss, are gone."""
    ways = [TieConfig(group_size=4, weight_gradient=how) for how in ("immediate", "fused")]
    recomputed = {"recompute": Recompute(method="uniform"), "micro_batch_size": 4}
    immediate, fused = (olmoe(tie, **recomputed) for tie in ways)
    tokens = 4 * 2048 * 8
    held = tokens * (2 * 2048 + 3 * 1024) * 2  # inputs and output gradients of both products
    copied = 4 * tokens * (2048 + 2 * 1024) * 2  # those of the first, of four layers, put together
    assert held < fused.memory.activations - immediate.memory.activations - copied < 4 * held


def test_only_grouped_experts_fuse() -> None:
    other = subject(expert_backend="te")
    with pytest.raises(ConfigError, match="must be auto or immediate"):
        other.model.topology(TieConfig(group_size=4, weight_gradient="fused"))
    recompute = Recompute(method="uniform")
    layout = Layout(world_size=8, seq_length=2048, global_batch_size=256, micro_batch_size=4, recompute=recompute)
    plans = [other.plan(TieConfig(group_size=4, weight_gradient=how), layout) for how in ("immediate", "auto")]
    assert plans[0].memory.activations == plans[1].memory.activations
    grouped = subject().plan(TieConfig(group_size=4, weight_gradient="fused"), layout)
    assert grouped.memory.activations > plans[0].memory.activations


def test_a_tied_bank_collects_its_gradient_beside_what_is_made() -> None:
    """Untied or fused, the first product and its flat copy are there at once; else it and the sum of both."""
    few_tokens = {"world_size": 512, "global_batch_size": 512, "seq_length": 8}
    immediate, fused = (
        TieConfig(group_size=16, skip_first=0, skip_last=0, weight_gradient=how) for how in ("immediate", "fused")
    )
    first = 64 * 2 * 1024 * 2048 * 2
    for stage, of_untied, of_tied in ((2, 2, 2.5), (3, 2, 3)):
        plans = (olmoe(tie, zero_stage=stage, **few_tokens) for tie in (TieConfig(), immediate, fused))
        for plan, expected in zip(plans, (of_untied, of_tied, of_untied), strict=True):
            assert plan.memory.activations == pytest.approx(expected * first, rel=0.05)


def test_stage_3_updates_sub_groups() -> None:
    """Where the update is the highest point: 12 bytes an element beside all states."""
    sizes = (6 * 10**8, 10**9)
    extra = [olmoe(world_size=1, seq_length=8, zero_stage=3, sub_group_size=size).memory.step_extra for size in sizes]
    assert extra[1] - extra[0] == 12 * (sizes[1] - sizes[0])


def test_buckets_and_micro_batches_under_way() -> None:
    one, two = (olmoe(overlap_comm=overlap).memory.buffers for overlap in (False, True))
    assert two == 2 * one == 4 * 500_000_000
    # The first of four stages has four micro-batches under way, and a quarter of the layers.
    whole, first = olmoe(world_size=1), olmoe(world_size=4, pipeline_parallel=4)
    assert first.memory.activations == pytest.approx(whole.memory.activations, rel=0.1)


@pytest.mark.parametrize("recompute", [Recompute(frozenset({"moe_act"})), Recompute(frozenset({"moe"}))])
def test_recompute_trades_memory_for_operations(recompute: Recompute) -> None:
    plain, again = olmoe(micro_batch_size=4), olmoe(micro_batch_size=4, recompute=recompute)
    assert again.memory.activations < plain.memory.activations
    assert again.time.total >= plain.time.total


def test_operations_are_six_per_active_weight_and_token() -> None:
    model = ModelConfig.resolve({"preset": "olmoe"})
    flops = flops_per_token(model, model.topology(TIED), 2048, model.vocab_size)
    count = subject().parameters(TIED)
    matrices = count.active - count.embedding - count.norms
    assert flops.experts + flops.dense == 2 * matrices
    assert flops.shared == flops.mlp == 0
    assert flops.attention == 16 * 2 * 2048 * 2048  # layers x (scores and values) x half of the pairs x 2 x width
    assert flops.training == 3 * flops.forward
    assert recomputed_share(flops, Recompute(method="uniform"), 16) == 1
    assert recomputed_share(flops, Recompute(frozenset({"moe"})), 16) == flops.experts / flops.forward


def test_tying_divides_the_traffic_of_banks_and_leaves_all_to_all() -> None:
    layout = {"world_size": 64, "expert_parallel": 8, "global_batch_size": 512}
    untied, tied = olmoe(TieConfig(), **layout), olmoe(TIED, **layout)
    assert untied.wire("bank gradients") == pytest.approx(16 / 7 * tied.wire("bank gradients"), rel=1e-6)
    for purpose in ("dense gradients", "dispatch", "combine"):
        assert untied.wire(purpose) == tied.wire(purpose)


def test_what_hides_behind_computation() -> None:
    layout = {"world_size": 64, "global_batch_size": 4096, "overlap_comm": True}
    in_the_open = olmoe(**{**layout, "overlap_comm": False}).time.seconds["gradients"]
    one_at_a_time, all_at_once = olmoe(**layout), olmoe(**layout, micro_batch_size=64)
    assert "gradients" not in all_at_once.time.seconds
    # Of 64 micro-batches only the last one's computation hides the reduction.
    hidden = in_the_open - one_at_a_time.time.seconds["gradients"]
    assert hidden == pytest.approx(one_at_a_time.time.seconds["compute"] * 0.8 / 64)
    # DeepSpeed fetches a bank of OLMoE ahead, but none that has more than 10^9 elements.
    stage_3 = Layout(world_size=64, seq_length=4096, global_batch_size=1024, zero_stage=3, micro_batch_size=4)
    assert "weights" not in subject().plan(TIED, stage_3).time.seconds
    assert "weights" in subject("qwen3_235b_a22b").plan(TIED, stage_3).time.seconds


def test_the_busiest_rank_holds_up_the_all_to_all_and_the_experts() -> None:
    even, uneven = (olmoe(expert_parallel=8, micro_batch_size=4, imbalance=imbalance) for imbalance in (1.0, 2.0))
    assert uneven.time.seconds["all-to-all"] == pytest.approx(2 * even.time.seconds["all-to-all"])
    assert uneven.time.seconds["compute"] > even.time.seconds["compute"]


def test_full_recompute_by_segments() -> None:
    layers = Recompute(method="uniform", num_layers=4)
    assert [list(layers.segment(layer, 6)) for layer in (0, 3, 5)] == [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5]]
    first = Recompute(method="block", num_layers=2)
    assert [list(first.segment(layer, 6)) for layer in (0, 1, 2)] == [[0], [1], []]
    # Longer segments keep fewer inputs, and bring back more layers at once.
    one, eight = (
        olmoe(micro_batch_size=8, recompute=Recompute(method="uniform", num_layers=count)) for count in (1, 8)
    )
    assert eight.memory.activations > one.memory.activations


def test_states_of_another_accumulation_are_not_taken_from_the_cache() -> None:
    planned = subject()
    layout = Layout(world_size=8, seq_length=2048, global_batch_size=8, zero_stage=2)
    once = planned.plan(TIED, layout)
    twice = planned.plan(TIED, replace(layout, global_batch_size=16))
    assert twice.memory.states.gradients == 2 * once.memory.states.gradients


def test_latent_attention_without_norms_has_none() -> None:
    with_norms, without = (subject("deepseek_v2_lite", qk_layernorm=on).parameters(TIED) for on in (True, False))
    assert with_norms.norms - without.norms == 27 * 512


@pytest.mark.parametrize("stage", range(4))
def test_frozen_norms_have_weights_alone(stage: int) -> None:
    def states(frozen: frozenset[str]) -> tuple[int, int, int]:
        found = olmoe(world_size=1, zero_stage=stage, frozen=frozen).memory.states
        return found.weights, found.optimizer, sum(found.layer_gradients.values())

    norms = olmoe().parameters.norms
    trained, frozen = states(frozenset()), states(frozenset({"norms"}))
    assert frozen[0] == pytest.approx(trained[0], abs=8)
    # The two moments, the fp32 master (none at stage 0), and bf16 gradients.
    assert trained[1] - frozen[1] == pytest.approx(norms * (8 if stage == 0 else 12), abs=24)
    assert trained[2] - frozen[2] == 2 * norms


def test_what_leaves_a_node_by_the_order_of_ranks() -> None:
    inside = Flow("dispatch", "all-to-all", "expert", 8, 1, 800)
    assert (inside.wire, inside.between_nodes(8)) == (700, 0)
    assert inside._replace(ranks=16).between_nodes(8) == 400
    # Two of a group's eight ranks are in each node of 8 when its neighbours are 4 apart.
    ring = Flow("bank gradients", "all-reduce", "expert data", 8, 4, 800)
    assert (ring.wire, ring.between_nodes(8)) == (1400, 700)
    assert ring._replace(stride=8).between_nodes(8) == 1400
    assert ring._replace(ranks=2).between_nodes(8) == 0


def test_pipeline_stages_share_the_layers_and_copy_banks_that_cross() -> None:
    layout = {"world_size": 8, "pipeline_parallel": 4, "global_batch_size": 64}
    plan = olmoe(replace(TIED, pipeline="allreduce"), **layout)
    assert plan.layout.stages(plan.topology) == [range(0, 4), range(4, 8), range(8, 12), range(12, 16)]
    assert {flow.purpose for flow in plan.traffic} >= {"pipeline", "bank copies"}
    assert "pipeline bubble" in plan.time.seconds
    # Groups that begin and end with a stage have one copy; others move the cut.
    for tie, ends in ((TieConfig(group_size=4, skip_first=0, skip_last=0), (4, 8, 12, 16)), (TIED, (2, 6, 10, 16))):
        aligned = olmoe(tie, **layout)
        assert tuple(stage.stop for stage in aligned.layout.stages(aligned.topology)) == ends
        assert "bank copies" not in {flow.purpose for flow in aligned.traffic}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"expert_parallel": 3}, "parallel.expert_model_parallel_size"),
        ({"tensor_parallel": 3}, "parallel.tensor_model_parallel_size"),
        ({"pipeline_parallel": 32, "world_size": 32}, "parallel.pipeline_model_parallel_size"),
        ({"pipeline_parallel": 2, "zero_stage": 2}, "deepspeed.zero_optimization.stage"),
        ({"micro_batch_size": 3}, "train.global_batch_size"),
        (
            {"tie": replace(TIED, share="all"), "pipeline_parallel": 2},
            "tie.share",
        ),
    ],
)
def test_what_cannot_be_laid_out_is_told(change: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as error:
        olmoe(**change)
    assert field in {problem.field for problem in error.value.problems}


def test_a_search_finds_what_fits_and_sorts_it() -> None:
    planned, layout = subject("qwen3_30b_a3b"), Layout(world_size=16, seq_length=4096, global_batch_size=256)
    found = search(planned, TieConfig(), layout, (1, 4))
    assert found.considered == len(list(candidates(planned, TieConfig(), layout, (1, 4))))
    assert 0 < len(found.fitting) < found.considered
    assert all(plan.fits for plan in found.fitting)
    times = [plan.time.total for plan in found.fitting]
    assert times == sorted(times)
    assert {plan.topology.tie.group_size for plan in found.fitting} == {1, 4}
    of_ties = {(tied.group_size, tied.num_tied_experts) for tied, _ in candidates(planned, WIDER, layout, (1, 4))}
    assert of_ties == {(1, None), (4, 256)}
    assert found.smallest.memory.total <= min(plan.memory.total for plan in found.fitting)
    with pytest.raises(ConfigError, match=r"tie\.banks"):
        search(planned, TieConfig(banks=list(range(48))), layout, (1,))


def test_tensor_parallel_ranks_share_the_logits() -> None:
    """All tokens times a part of the vocabulary: at TP 4 a quarter, not a sixteenth."""
    model = ModelConfig.resolve({"preset": "olmoe"})
    one, four = (
        loss_activations(model, Layout(world_size=4, seq_length=4096, tensor_parallel=size), model.vocab_size, FUSED)
        for size in (1, 4)
    )
    assert four.extra == one.extra / 4
    assert four.saved == pytest.approx(one.saved / 4)


@pytest.mark.parametrize(
    ("capacity", "padded", "expected"), [(None, False, 1.5), (1.0, False, 1.0), (2.0, False, 1.5), (2.0, True, 2.0)]
)
def test_a_capacity_factor_bounds_the_busiest_rank(capacity: float | None, padded: bool, expected: float) -> None:
    options = {"moe_expert_capacity_factor": capacity, "moe_pad_expert_input_to_capacity": padded}
    model = ModelConfig.resolve({"preset": "olmoe", **options})
    assert busiest(model, Layout(world_size=8, seq_length=64, expert_parallel=8, imbalance=1.5)) == expected


def test_advice_makes_it_fit_or_faster() -> None:
    planned = subject("qwen3_30b_a3b")
    layout = Layout(world_size=16, seq_length=4096, global_batch_size=256)
    plan = planned.plan(TieConfig(), layout)
    assert not plan.fits
    found = changes(planned, TieConfig(), plan)
    assert found
    assert all(change.plan.fits for change in found)
    fitting = planned.plan(TIED, replace(layout, zero_stage=3, expert_parallel=16))
    assert fitting.fits
    assert all(change.plan.time.total < fitting.time.total for change in changes(planned, TIED, fitting))


def test_advice_evens_out_stages_that_were_cut_between_tie_groups() -> None:
    uneven = olmoe(TIED, world_size=8, pipeline_parallel=4, global_batch_size=64)
    evened = next(change for change in changes(subject("olmoe_1b_7b"), TIED, uneven) if "tie.pipeline" in change.text)
    assert evened.text == "tie.pipeline=allreduce"
    assert [len(stage) for stage in evened.plan.layout.stages(evened.plan.topology)] == [4, 4, 4, 4]


def test_a_plan_is_json() -> None:
    plan = olmoe(expert_parallel=4)
    told = json.loads(json.dumps(plan.to_json()))
    assert told["memory"]["total"] == plan.memory.total
    assert sum(told["memory"][part] for part in plan.memory.parts) == told["memory"]["total"]
    assert told["parameters"]["total"] == plan.parameters.total


def test_hardware_of_ones_own(tmp_path) -> None:
    file = tmp_path / "mine.yaml"
    h100 = load_hardware("h100").model_dump(exclude={"name"})
    file.write_text(json.dumps({"mine": {**h100, "memory_gb": 40}, "broken": {**h100, "memory_gb": -1}}))
    assert load_hardware(f"{file}:mine").memory == 40 * GB
    for choice, told in (
        (f"{file}:broken", "memory_gb"),
        (f"{file}:other", "mine"),
        ("h10", "h100"),
        ("x:h100", "--h"),
    ):
        with pytest.raises(ConfigError, match=told):
            load_hardware(choice)


def test_what_is_shared_is_computed_by_every_layer() -> None:
    planned = subject()
    layout = Layout(world_size=8, seq_length=2048, global_batch_size=256)
    flops = {share: planned.plan(replace(TIED, share=share), layout).flops for share in ("experts", "all")}
    assert flops["all"] == flops["experts"] == planned.plan(TieConfig(), layout).flops


@pytest.mark.parametrize(("stage", "part"), [(0, "optimizer"), (1, "parameters"), (2, "parameters")])
def test_an_offload_that_deepspeed_passes_over_cannot_be_planned(stage: int, part: str) -> None:
    with pytest.raises(ConfigError, match=rf"zero_optimization.stage = {stage}: must be at least"):
        olmoe(zero_stage=stage, **{f"offload_{part}": True})


def test_advice_and_search_offer_what_megatron_core_takes() -> None:
    planned = subject("qwen3_30b_a3b")
    layout = Layout(world_size=16, seq_length=4096, global_batch_size=256, recompute=Recompute(method="block"))
    texts = [change.text for change in changes(planned, TieConfig(), planned.plan(TieConfig(), layout))]
    texts += [change.text for change in changes(planned, TIED, planned.plan(TIED, layout))]
    selective = [text for text in texts if "selective" in text]
    assert selective
    assert all("recompute_method=null model.recompute_num_layers=null" in text for text in selective)
    grouped, one_by_one = (
        {plan.layout.recompute for plan in search(of, TIED, layout, (4,)).fitting}
        for of in (subject(), subject(expert_backend="sequential"))
    )
    assert grouped - one_by_one == {Recompute(frozenset({"moe_act"}))}


def test_a_search_without_a_rank_for_every_stage_finds_nothing() -> None:
    layout = Layout(world_size=2, seq_length=4096, global_batch_size=256, pipeline_parallel=4)
    assert search(subject(), TIED, layout, (4,)).considered == 0


def test_precisions_without_a_speed_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    h100 = load_hardware("h100").model_dump(exclude={"name"})
    file.write_text(yaml.safe_dump({"MI300X": h100 | {"tflops": {"bf16": 900}}}))
    planned = Subject(ModelConfig.resolve({"preset": "olmoe"}), load_hardware(f"{file}:MI300X"))
    layout = Layout(world_size=8, seq_length=2048, global_batch_size=256)
    assert planned.plan(TIED, layout).hardware.name == "MI300X"
    with pytest.raises(ConfigError, match="--hardware = 'MI300X': must say its tflops in fp32"):
        planned.plan(TIED, replace(layout, precision="fp32"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("mine: 3", "must be an entry of a YAML file, such as hardware.yaml has"),
        ("", "must be an entry of a YAML file, such as hardware.yaml has"),
        ("mine: {tflops: 3}", "mine.memory_gb = None: must be given"),
        ("mine: {matmul_efficiency: 0}", "mine.matmul_efficiency = 0: must be greater than 0"),
    ],
)
def test_hardware_files_that_are_none(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as error:
        load_hardware(f"{file}:mine")
    assert message in str(error.value)
