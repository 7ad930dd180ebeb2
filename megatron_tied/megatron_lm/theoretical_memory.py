"""Megatron-LM's theoretical memory report for a model with banks."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_tied.megatron_lm.arguments import topology_from_args


@contextmanager
def counting_banks_once(args: Namespace) -> Iterator[None]:
    """Let the report's arithmetic see as many experts per MoE layer as there are on average in all banks.

    It multiplies the experts of a layer by the number of MoE layers, those of multi-token prediction among them,
    which are not tied. Exact for the whole model; of its parts, as exact as an average is.
    """
    topology = topology_from_args(args)
    last_is_moe = topology.bank_of_layer[-1] is not None
    untied = (args.mtp_num_layers or 0) if last_is_moe else 0
    experts = args.num_experts
    in_banks = sum(topology.num_experts(bank, experts) for bank in topology.banks)
    args.num_experts = (in_banks + untied * experts) / (len(topology.moe_layers) + untied)
    try:
        yield
    finally:
        args.num_experts = experts
