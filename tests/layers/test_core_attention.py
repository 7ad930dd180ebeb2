"""Our core attention against Megatron-Core's, and against the formula where upstream's has no such widths."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from megatron_tied import ConfigError
from megatron_tied.layers.core_attention import ScaledDotProductAttention
from megatron_tied.models.gpt import transformer_config
from tests.tiny_model import model_config

pytestmark = pytest.mark.usefixtures("one_process")

LENGTH, BATCH, HEADS, GROUPS, WIDTH = 7, 2, 4, 2, 8


def attention(kind: type, **options: Any) -> torch.nn.Module:
    made = {name: options.pop(name) for name in ("softmax_scale", "k_channels", "v_channels") if name in options}
    config = transformer_config(model_config(**options))
    return kind(config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self", **made)


def tensors(value_width: int = WIDTH, groups: int = GROUPS) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((HEADS, WIDTH), (groups, WIDTH), (groups, value_width))
    return tuple(torch.randn(LENGTH, BATCH, *shape, generator=generator).requires_grad_() for shape in shapes)


def masks() -> dict[str, torch.Tensor]:
    causal = torch.ones(LENGTH, LENGTH).triu(1).bool()[None, None]
    padded = torch.zeros(BATCH, 1, 1, LENGTH, dtype=torch.bool)
    padded[1, ..., 1:3] = True
    return {"causal": causal, "causal and padding": causal | padded, "everything": torch.zeros_like(causal)}


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("scale", [None, 0.5])
def test_equals_upstream(mask: str, scale: float | None) -> None:
    results = []
    for kind in (DotProductAttention, ScaledDotProductAttention):
        inputs = tensors()
        output = attention(kind, softmax_scale=scale)(*inputs, masks()[mask])
        (output * torch.arange(output.numel()).view_as(output)).mean().backward()
        results.append((output, *(tensor.grad for tensor in inputs)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_without_a_mask_it_is_causal() -> None:
    inputs = tensors()
    ours = attention(ScaledDotProductAttention)
    torch.testing.assert_close(ours(*inputs, None), ours(*inputs, masks()["causal"]))


@pytest.mark.parametrize("value_width", [5, 12])
def test_values_have_a_width_of_their_own(value_width: int) -> None:
    query, key, value = tensors(value_width, HEADS)
    found = attention(ScaledDotProductAttention, k_channels=WIDTH, v_channels=value_width)(query, key, value, None)
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) / math.sqrt(WIDTH)
    weights = scores.masked_fill(masks()["causal"], -math.inf).softmax(-1)
    torch.testing.assert_close(found, torch.einsum("bhqk,kbhd->qbhd", weights, value).flatten(2))


def test_dropout_comes_from_megatrons_stream_and_ends_with_training() -> None:
    ours, inputs = attention(ScaledDotProductAttention, attention_dropout=0.5), tensors()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    dropped = ours(*inputs, None)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(ours(*inputs, None), dropped)
    plain = attention(ScaledDotProductAttention)(*inputs, None)
    assert not torch.equal(dropped, plain)
    assert torch.equal(ours.eval()(*inputs, None), plain)


@pytest.mark.parametrize(("field", "value"), [("window_size", (3, 0)), ("softmax_type", "off-by-one")])
def test_what_needs_transformer_engine_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"model\.{field}"):
        attention(ScaledDotProductAttention, **{field: value})
