"""Initial weights by the paper's method: uniform, within bounds that follow from each matrix's own sizes."""

from __future__ import annotations

import math

import pytest
import torch

from tests.tiny_model import FIELDS, build

pytestmark = pytest.mark.usefixtures("one_process")


def bound(rows: int, columns: int) -> float:
    """Xavier's, with gain 1 / sqrt(3 depth)."""
    return math.sqrt(6 / (rows + columns)) / math.sqrt(3 * FIELDS["num_layers"])


def test_depth_scaled_xavier() -> None:
    named = dict(build(init_method="depth_scaled_xavier").named_parameters())
    hidden, ffn, width = FIELDS["hidden_size"], FIELDS["moe_ffn_hidden_size"], 8
    heads, groups = FIELDS["num_attention_heads"], FIELDS["num_query_groups"]
    qkv = named["decoder.layers.1.self_attention.linear_qkv.weight"].view(groups, heads // groups + 2, width, hidden)
    fc1 = named["decoder.layers.1.mlp.experts.fc1_weight"]
    matrices = [
        (qkv[:, :-2], heads * width, hidden),
        (qkv[:, -2], groups * width, hidden),
        (qkv[:, -1], groups * width, hidden),
        (named["decoder.layers.1.self_attention.linear_proj.weight"], hidden, heads * width),
        (fc1[:, :ffn], 2 * ffn, hidden),
        (fc1[:, ffn:], 2 * ffn, hidden),
        (named["decoder.layers.1.mlp.experts.fc2_weight"], hidden, ffn),
        (named["decoder.layers.1.mlp.router.weight"], FIELDS["num_moe_experts"], hidden),
        (named["embedding.word_embeddings.weight"], FIELDS["vocab_size"], hidden),
        (named["output_layer.weight"], FIELDS["vocab_size"], hidden),
    ]
    for values, rows, columns in matrices:
        largest = bound(rows, columns)
        assert values.abs().max() <= largest
        assert values.abs().max() > 0.97 * largest
        # A uniform distribution's.
        assert values.std().item() == pytest.approx(largest / math.sqrt(3), rel=0.1)
    assert torch.equal(named["decoder.final_layernorm.weight"], torch.ones(hidden))
