"""Arguments of Megatron-LM that cannot be with tied experts: validation refuses them, `megatron-tied patch` warns."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_tied.errors import Problem
from megatron_tied.megatron_lm.arguments import flag

_ONE_WEIGHT_A_MODULE = "shards each module's own weights; use --use-distributed-optimizer"
_OTHER_MODEL = "builds another kind of model than the GPT that is tied here"
# By argument: why, and what to do.
REFUSED = {
    "hybrid_layer_pattern": _OTHER_MODEL,
    "hybrid_override_pattern": _OTHER_MODEL,
    "is_hybrid_model": _OTHER_MODEL,
    "use_torch_fsdp2": _ONE_WEIGHT_A_MODULE,
    "use_megatron_fsdp": _ONE_WEIGHT_A_MODULE,
    "init_model_with_meta_device": "makes new weights after the layers are tied; take it out",
    "moe_use_upcycling": "makes experts of a dense model layer by layer; upcycle untied, then tie the checkpoint",
    "use_mup": "sets learning rates by the width of a weight, against those of banks; take it out",
    "perform_rl_step": "builds models of its own for inference, which share no experts; take it out",
    "export_kd_teacher_load": "builds a teacher of its own, whose layers are not tied; take it out",
    "delay_wgrad_compute": "keeps one weight gradient a module, and a bank has several; take it out",
    "overlap_moe_expert_parallel_comm": "runs layers in parts of its own, without the tied layer's; take it out",
}


def refusal(argument: str, value: object) -> Problem:
    """What is told of `argument`, one of `REFUSED`."""
    return Problem(flag(argument), value, f"cannot be used with tied experts: it {REFUSED[argument]}")


def graph_refusal(value: str) -> Problem:
    """What is told of `--cuda-graph-impl`, unless it is none."""
    valid = "must be none with tied experts: a graph does not see the weights of another layer's bank"
    return Problem("--cuda-graph-impl", value, valid)


def width_misfits(
    experts: int, *, expert_parallel: int | None, router_groups: int | None, topk: int | None, expert_bias: bool
) -> Iterator[Problem]:
    """What Megatron-LM checks of --num-experts, of the experts of a wider or narrower tied bank; None: not known."""
    name = flag("moe_tie_num_experts")
    for argument, parts in (("expert_model_parallel_size", expert_parallel), ("moe_router_num_groups", router_groups)):
        if parts and experts % parts:
            yield Problem(name, experts, f"must be a multiple of {flag(argument)} = {parts}")
    if topk and experts < topk:
        yield Problem(name, experts, f"must be at least --moe-router-topk = {topk}")
    if expert_bias:
        valid = "cannot be given with --moe-router-enable-expert-bias: Megatron-Core updates routers of one width"
        yield Problem(name, experts, valid)
