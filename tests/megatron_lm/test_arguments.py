"""The flags, what they mean, and what is refused before any model is built."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import fields
from types import SimpleNamespace

import pytest

from megatron_tied.errors import ConfigError
from megatron_tied.megatron_lm import add_tie_arguments, hooks, topology_from_args
from megatron_tied.megatron_lm.arguments import NAMES, tie_config, ties
from megatron_tied.megatron_lm.theoretical_memory import counting_banks_once
from megatron_tied.megatron_lm.validation import check_and_align, check_resolved, check_same_banks
from megatron_tied.topology import TieConfig
from tests.megatron_lm.arguments import parse


def test_every_field_of_the_tie_section_that_has_an_effect_has_a_flag() -> None:
    parsed = vars(add_tie_arguments(ArgumentParser()).parse_args([]))
    assert set(NAMES) == {field.name for field in fields(TieConfig)} - {"weight_gradient", "share"}
    assert set(NAMES.values()) == set(parsed)


def test_flags_are_the_tie_config() -> None:
    flags = (
        "--moe-tie-group-size 2 --moe-tie-skip-first 1 --moe-tie-skip-last 3 --moe-tie-pattern cyclic "
        "--moe-tie-block-size 2 --moe-tie-num-experts 16 --moe-tie-lr-divisor linear --moe-tie-pipeline allreduce"
    )
    assert tie_config(parse(*flags.split())) == TieConfig(
        group_size=2,
        skip_first=1,
        skip_last=3,
        pattern="cyclic",
        block_size=2,
        num_tied_experts=16,
        lr_divisor="linear",
        pipeline="allreduce",
    )
    assert tie_config(parse("--moe-tie-lr-divisor", "1.5")).lr_divisor == 1.5
    assert tie_config(parse()) == TieConfig()


def test_moe_layers_follow_the_frequency() -> None:
    banks = topology_from_args(parse("--moe-tie-banks", "0,0,1", num_layers=5, moe_layer_freq=[0, 1, 1, 0, 1]))
    assert banks.bank_of_layer == (None, 0, 0, None, 1)
    every_second = topology_from_args(parse("--moe-tie-banks", "0,1,1", num_layers=6, moe_layer_freq=2))
    assert every_second.bank_of_layer == (0, None, 1, None, 1, None)


def test_a_yaml_file_is_looked_at_when_it_is_one_namespace() -> None:
    # As `validate_yaml` does, which a name at both levels would break.
    def validate(args: Namespace, defaults: dict) -> SimpleNamespace:
        flat = SimpleNamespace(**vars(args), **vars(args.language_model), **vars(args.model_parallel))
        flat.num_experts = flat.num_moe_experts
        return flat

    parallel = SimpleNamespace(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=None)

    def read(**keys) -> SimpleNamespace:
        section = SimpleNamespace(num_moe_experts=8, num_layers=8, moe_layer_freq=1, **keys)
        return hooks.with_yaml_checks(validate)(Namespace(rank=0, language_model=section, model_parallel=parallel), {})

    assert not ties(read())
    assert topology_from_args(read(moe_tie_group_size=2)).bank_of_layer == (0, 1, 2, 2, 3, 3, 4, 5)
    with pytest.raises(ConfigError, match=r"--pipeline-model-parallel-size = '2': .* parts the tie groups of layers"):
        read(moe_tie_group_size=4)
    with pytest.raises(ConfigError, match="--moe-tie-skip-first = 1: has no effect"):
        read(moe_tie_skip_first=1)


@pytest.mark.parametrize(
    ("flags", "megatron", "message"),
    [
        ("--moe-tie-group-size 9", {}, "--moe-tie-group-size = 9: must be at most 4: 4 MoE layers lie between"),
        ("--moe-tie-group-size 0", {}, "--moe-tie-group-size = 0: must be an integer >= 1"),
        ("--moe-tie-banks 0,1", {}, r"--moe-tie-banks = \[0, 1\]: must have one entry per MoE layer: 8, not 2"),
        ("--moe-tie-group-size 2 --moe-tie-lr-divisor fast", {}, "--moe-tie-lr-divisor = 'fast': must be \"sqrt\""),
        ("--moe-tie-skip-first 1", {}, "--moe-tie-skip-first = 1: has no effect without --moe-tie-group-size"),
        ("--moe-tie-num-experts 16", {}, "--moe-tie-num-experts = 16: has no effect without"),
        ("--moe-tie-group-size 2", {"num_experts": None}, "--num-experts = None: must be given for tied experts"),
        ("--moe-tie-group-size 2", {"use_torch_fsdp2": True}, "--use-torch-fsdp2 = True: cannot be used with tied"),
        ("--moe-tie-group-size 2", {"delay_wgrad_compute": True}, "--delay-wgrad-compute = True: cannot be used"),
        ("--moe-tie-group-size 2", {"cuda_graph_impl": "local"}, "--cuda-graph-impl = 'local': must be none"),
        ("--moe-tie-group-size 2", {"use_mup": True}, "--use-mup = True: cannot be used with tied experts"),
    ],
)
def test_what_is_refused_names_the_flag(flags: str, megatron: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_and_align(parse(*flags.split(), **megatron))


def test_what_megatron_translates_is_refused_afterwards() -> None:
    args = parse("--moe-tie-group-size", "2", enable_cuda_graph=True)
    check_and_align(args)
    args.cuda_graph_impl = "local"  # as `validate_args` makes of it
    with pytest.raises(ConfigError, match="--cuda-graph-impl = 'local': must be none"):
        check_resolved(args)


@pytest.mark.parametrize(
    ("experts", "megatron", "message"),
    [
        ("6", {"expert_model_parallel_size": 4}, "= 6: must be a multiple of --expert-model-parallel-size = 4"),
        ("6", {"moe_router_num_groups": 4}, "= 6: must be a multiple of --moe-router-num-groups = 4"),
        ("1", {}, "= 1: must be at least --moe-router-topk = 2"),
        ("16", {"moe_router_enable_expert_bias": True}, "= 16: cannot be given with --moe-router-enable-expert-bias"),
    ],
)
def test_the_experts_of_a_bank_must_go_with_the_routers(experts: str, megatron: dict, message: str) -> None:
    args = parse("--moe-tie-group-size", "2", "--moe-tie-num-experts", experts, **megatron)
    with pytest.raises(ConfigError, match=f"--moe-tie-num-experts {message}"):
        check_resolved(args)


def test_untied_arguments_are_left_alone() -> None:
    args = parse(pipeline_model_parallel_size=2, use_torch_fsdp2=True)
    before = dict(vars(args))
    check_and_align(args)
    check_resolved(args)
    assert vars(args) == before
    assert not ties(args)


class TestPipeline:
    banks = ("--moe-tie-banks", "0,1,1,2,2,2,3,4")

    def test_an_even_cut_between_groups_stays(self) -> None:
        args = parse("--moe-tie-banks", "0,1,1,1,2,2,3,4", pipeline_model_parallel_size=2)
        check_and_align(args)
        check_resolved(args)
        assert args.pipeline_model_parallel_layout is None

    def test_an_even_cut_through_a_group_is_moved(self, capsys: pytest.CaptureFixture) -> None:
        args = parse(*self.banks, pipeline_model_parallel_size=2)
        check_and_align(args)
        check_resolved(args)
        assert args.pipeline_model_parallel_layout == "Et*3|t*5L"
        assert "cut between tie groups, layers 0-2 | 3-7" in capsys.readouterr().out

    def test_interleaved_chunks_are_moved_too(self) -> None:
        args = parse(*self.banks, pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=2)
        check_and_align(args)
        assert args.pipeline_model_parallel_layout == "Et|t*2|t*3|t*2L"
        assert args.num_layers_per_virtual_pipeline_stage is None
        check_resolved(args)

    def test_copies_need_no_alignment(self) -> None:
        args = parse(*self.banks, "--moe-tie-pipeline", "allreduce", pipeline_model_parallel_size=2)
        check_and_align(args)
        check_resolved(args)
        assert args.pipeline_model_parallel_layout is None

    @pytest.mark.parametrize("name", ["log_params_norm", "fp8_param_gather"])
    def test_what_copies_would_make_wrong_is_refused(self, name: str) -> None:
        flags = ("--moe-tie-pipeline", "allreduce")
        with_copies = parse(*self.banks, *flags, pipeline_model_parallel_size=2, **{name: True})
        with pytest.raises(ConfigError, match="cannot be used where pipeline stages hold copies of a bank"):
            check_resolved(with_copies)
        check_resolved(
            parse("--moe-tie-banks", "0,1,1,1,2,2,3,4", *flags, pipeline_model_parallel_size=2, **{name: True})
        )

    @pytest.mark.parametrize(
        ("layout", "message"),
        [
            (
                {"pipeline_model_parallel_layout": "Et*4|t*4L"},
                r"--pipeline-model-parallel-layout = 'Et\*4\|t\*4L': \(layers 0-3 \| 4-7\) parts the tie groups of "
                r"layers \[3, 4, 5\]: --pipeline-model-parallel-layout 'Et\*3\|t\*5L' works \(layers 0-2 \| 3-7\)",
            ),
            (
                {"decoder_first_pipeline_num_layers": 2},
                r"--decoder-first-pipeline-num-layers = '2': \(layers 0-1 \| 2-7\) parts the tie groups of ",
            ),
        ],
    )
    def test_a_mis_set_layout_is_refused_with_the_one_that_works(self, layout: dict, message: str) -> None:
        args = parse(*self.banks, pipeline_model_parallel_size=2, **layout)
        check_and_align(args)
        with pytest.raises(ConfigError, match=message):
            check_resolved(args)

    def test_where_no_cut_works_the_message_says_so(self) -> None:
        args = parse("--moe-tie-banks", "0,0,0,0,0,0,0,0", pipeline_model_parallel_size=2)
        with pytest.raises(ConfigError, match="no cut into 2 leaves the groups whole; use fewer stages, or --moe-tie-"):
            check_and_align(args)


def test_a_checkpoint_of_other_banks_is_refused() -> None:
    tied, same = parse("--moe-tie-group-size", "2"), parse("--moe-tie-banks", "0,1,2,2,3,3,4,5")
    check_same_banks(tied, same)
    untied = parse()
    for args, saved in ((tied, untied), (untied, tied), (parse("--moe-tie-group-size", "4"), tied)):
        with pytest.raises(ConfigError, match=r"expert banks by layer = .* must be that of the checkpoint"):
            check_same_banks(args, saved)
    wider = parse("--moe-tie-group-size", "2", "--moe-tie-num-experts", "16")
    with pytest.raises(ConfigError, match="must be that of the checkpoint, 0,1,2,2,3,3,4,5 with 16 tied experts"):
        check_same_banks(tied, wider)
    # A checkpoint from before the flags were there.
    with pytest.raises(ConfigError, match="that of the checkpoint, untied"):
        check_same_banks(tied, Namespace(num_experts=8))


@pytest.mark.parametrize(("flags", "mtp"), [("0,1,1,1,2,2,3,4", None), ("0,1,1,1,2,2,3,4", 1)])
def test_the_memory_report_counts_a_bank_once(flags: str, mtp: int | None) -> None:
    args = parse("--moe-tie-banks", flags, "--moe-tie-num-experts", "12", mtp_num_layers=mtp)
    with counting_banks_once(args):
        # What the report does: experts of a layer, times the MoE layers.
        counted = args.num_experts * (8 + (mtp or 0))
    assert counted == pytest.approx(8 * 3 + 12 * 2 + 8 * (mtp or 0))
    assert args.num_experts == 8
