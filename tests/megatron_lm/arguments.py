"""Megatron-LM's arguments as its parser leaves them, of a small model."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from megatron_tied.megatron_lm import add_tie_arguments


def parse(*flags: str, **megatron: Any) -> Namespace:
    """The tying flags, parsed, beside Megatron-LM's own arguments as they are by default."""
    own = {
        "rank": 0,
        "num_layers": 8,
        "num_experts": 8,
        "moe_layer_freq": 1,
        "mtp_num_layers": None,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "num_layers_per_virtual_pipeline_stage": None,
        "num_virtual_stages_per_pipeline_rank": None,
        "pipeline_model_parallel_layout": None,
        "decoder_first_pipeline_num_layers": None,
        "decoder_last_pipeline_num_layers": None,
        "account_for_embedding_in_pipeline_split": False,
        "account_for_loss_in_pipeline_split": False,
        "cuda_graph_impl": "none",
        "expert_model_parallel_size": 1,
        "moe_router_topk": 2,
        "moe_router_num_groups": None,
        "moe_router_enable_expert_bias": False,
    }
    return add_tie_arguments(ArgumentParser()).parse_args(flags, Namespace(**own | megatron))
